"""Functions by name: what is shipped, of a module, of a file; every mistake in one line."""

import sys
from pathlib import Path

import pytest

from trl_entropy.tasks.named import absolute, files_of, is_of_user, named, with_settings

FILE = Path(__file__).with_name("own_functions.py")


def of_file(name):
    return named("reward_funcs", f"{FILE}:{name}", {})


def test_a_function_is_found_in_a_table_a_module_and_a_file():
    table = {"known": lambda: max}
    assert named("reward_funcs", "known", table).value is max
    assert named("reward_funcs", "math:sqrt", table).value(9) == 3
    assert named("reward_funcs", "os.path.join", table).value("a", "b") == "a/b"
    one = of_file("brevity")
    assert (one.short, one.file, one.name) == ("brevity", FILE, f"{FILE}:brevity")
    assert one.value is of_file("brevity").value, "a file is imported once"


def test_the_path_of_a_file_is_made_absolute_and_nothing_else(monkeypatch):
    monkeypatch.chdir(FILE.parent)
    assert absolute("own_functions.py:brevity") == f"{FILE}:brevity"
    assert [absolute(name) for name in ("tag_pref", "a.b:c", "rows.jsonl")] == ["tag_pref", "a.b:c", "rows.jsonl"]
    assert [is_of_user(name) for name in ("tag_pref", "org/model", "a.b:c", "a.b.c", "no.jsonl")] == [
        False, False, True, True, False]  # fmt: skip


def test_the_hash_of_a_file_follows_its_contents_without_importing_it(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("raise SystemExit")
    before = files_of([f"{file}:f", "unheard.of:f"])
    file.write_text("raise SystemExit()")
    assert list(before) == [str(file)] and before != files_of([f"{file}:f"])


def test_a_changed_file_is_imported_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)  # as it is where people work
    file = tmp_path / "mine.py"
    for grade in (1, 2):
        file.write_text(f"def grade():\n    return {grade}\n")
        assert named("reward_funcs", f"{file}:grade", {}).value() == grade


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tag_perf", "there is no 'tag_perf'; is tag_pref meant?"),
        ("nothing", "there is no 'nothing'; use tag_pref, package.module:function, or path/to/file.py:function."),
        ("no_such_package.rewards:f", "the module no_such_package.rewards cannot be imported: ModuleNotFoundError"),
        ("math:sqr", "math has no 'sqr'; it has "),
        ("nowhere.py:f", "there is no file nowhere.py (seen from "),
        (f"{FILE}:brevety", f"{FILE} has no 'brevety'; it has brevity, same_answer"),
        (":f", "':f' must be package.module:function"),
    ],
)
def test_a_name_of_nothing_is_refused_in_one_line(name, said):
    with pytest.raises(ValueError, match="reward_funcs") as refused:
        named("reward_funcs", name, {"tag_pref": lambda: None})
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ny = x / 0\n", "line 2: ZeroDivisionError: division by zero."),
        ("def f(:\n", "line 1: SyntaxError: "),
        ("import no_such_package\n", "line 1: ModuleNotFoundError: No module named 'no_such_package'."),
        ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3."),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_its_line(tmp_path, text, said):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.py, line") as refused:
        named("reward_funcs", f"{file}:f", {})
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_keyword_settings_are_applied_and_the_name_is_kept():
    function = with_settings("reward_kwargs", of_file("brevity"), {"most": 4}, "completions")
    assert function(prompts=None, completions=["one two"]) == [0.5] and function.__name__ == "brevity"
    made = with_settings("reward_kwargs", of_file("longer_than"), {"least": 3}, "completions")
    assert made(prompts=None, completions=["ab", "abcd"]) == [0.0, 1.0] and made.__name__ == "longer"
    judge = with_settings("reward_kwargs", of_file("Judge"), {"grade": 2.0}, "completions")
    assert judge(prompts=None, completions=["a"]) == [2.0] and judge.__name__ == "Judge"


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("number", {}, "is no function, it is 3.14"),
        ("longer_than", {}, "TypeError: longer_than() missing 1 required positional argument: 'least'"),
        ("longer_than", {"most": 1}, "takes no 'most'; it takes least."),
        ("is_easy", {}, "TypeError: is_easy() missing 1 required"),
    ],
)
def test_what_is_no_such_function_is_refused(name, given, said):
    with pytest.raises(ValueError, match=name) as refused:
        with_settings("reward_funcs", of_file(name), given, "completions")
    assert said in str(refused.value) and "\n" not in str(refused.value)
