"""Mutations of files as accidents and mistakes make them: cut, zeroed, overwritten, with a value of another kind."""

import json
import random
from collections.abc import Callable

import yaml

ODD_VALUES = [
    *(
        None,
        "",
        " ",
        "abc",
        "~",
        "no",
        "None",
        "1e-6",
        "0x10",
        "1,5",
        "٣",
        "a\tb",
        "a\nb",
        "\x00",
        "hf://",
        "../..",
        "/",
    ),
    *(True, False, 0, -1, 1, 2, 3, 7, 10**9, 10**30, 0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf")),
    *([], {}, [None], ["abc"], [1, "a"], [[]], {"a": 1}, {"a": {"b": []}}, [-1, 5], [1e-1, 5]),
]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _empty(data: bytes, rng: random.Random) -> bytes:
    return b""


def _zeros(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + bytes(len(data) - start)


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 5))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _inserted(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return (
        data[:place]
        + rng.choice([b"\t", b"\n", b"\xff\xfe", b":", b"{", b'"', b"- ", b"#", b"NaN", b"1"])
        + data[place:]
    )


def _without_piece(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 1, 3, 20)) :]


def _lines_moved(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    how = rng.choice(("swap", "double", "drop"))
    if len(lines) > 1:
        a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
        if how == "swap":
            lines[a], lines[b] = lines[b], lines[a]
        elif how == "double":
            lines.insert(b, lines[a])
        else:
            del lines[a]
    return b"".join(lines)


def _other_kind(data: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"[]", b"{}", b"3", b"null", b'"text"', b"[[1]]", b'{"step": "x"}'])


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": _cut,
    "empty": _empty,
    "zeros": _zeros,
    "flipped": _flipped,
    "inserted": _inserted,
    "without a piece": _without_piece,
    "lines moved": _lines_moved,
    "of another kind": _other_kind,
}


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """`data` with one accident."""
    return BYTES[rng.choice(list(BYTES))](data, rng)


def mutated_tree(tree: object, rng: random.Random, extra_keys: tuple[str, ...] = ()) -> object:
    """
    A tree of dicts and lists with one entry changed, removed, or added.

    Args:
        extra_keys: names of which one may be added to the mapping on top.
    """
    if isinstance(tree, dict) and tree:
        key = rng.choice(list(tree))
        how = rng.choice(("value", "value", "deep", "remove", "rename", "add", "add"))
        if how == "add" and extra_keys:
            return {**tree, rng.choice(extra_keys): rng.choice(ODD_VALUES)}
        if how == "remove":
            return {name: value for name, value in tree.items() if name != key}
        if how == "rename":
            return {(f"{name}s" if name == key else name): value for name, value in tree.items()}
        if how == "deep" and isinstance(tree[key], dict | list):
            return {**tree, key: mutated_tree(tree[key], rng)}
        return {**tree, key: rng.choice(ODD_VALUES)}
    if isinstance(tree, list) and tree:
        place = rng.randrange(len(tree))
        return [*tree[:place], mutated_tree(tree[place], rng), *tree[place + 1 :]]
    return rng.choice(ODD_VALUES)


def mutated_yaml(data: bytes, rng: random.Random, extra_keys: tuple[str, ...] = ()) -> bytes:
    """A YAML file with one to three wrong settings, or one accident to its bytes."""
    if rng.random() < 0.3:
        return mutated_bytes(data, rng)
    tree = yaml.safe_load(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = mutated_tree(tree, rng, extra_keys)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()


def mutated_json_lines(data: bytes, rng: random.Random) -> bytes:
    """JSON, or JSON lines, with one wrong value in one line, or one accident to their bytes."""
    lines = data.splitlines()
    if rng.random() < 0.5 or not lines:
        return mutated_bytes(data, rng)
    place = rng.randrange(len(lines))
    try:
        tree = json.loads(lines[place])
    except ValueError:  # a line of a file that is one object
        return mutated_bytes(data, rng)
    lines[place] = json.dumps(mutated_tree(tree, rng)).encode()
    return b"\n".join(lines) + b"\n"
