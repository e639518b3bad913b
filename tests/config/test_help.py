"""`--help` is what one sets first, `--help all` is everything once."""

import re

import pytest

from trl_entropy.config.command_line import parse, parse_sft
from trl_entropy.config.help import FIRST, WIDTH


def shown(capsys, read, *words):
    with pytest.raises(SystemExit) as ended:
        read(list(words))
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= WIDTH + 40  # a setting with its default is not folded
    return text, re.findall(r"^  --(\w+)", text, re.MULTILINE)


def test_short_help_is_what_one_sets_first_and_says_where_the_rest_is(capsys):
    text, settings = shown(capsys, parse, "--help")
    assert tuple(settings) == FIRST and len(text.splitlines()) < 110
    number = re.search(r"trl-entropy train --help all shows the other (\d+)", text)
    _, every = shown(capsys, parse, "--help", "all")
    assert len(every) == len(set(every)) == len(settings) + int(number[1])
    assert {"adam_beta2", "lora_r", "num_generations", "fisher_num_sequences", "tools"} <= set(every)


def test_sft_has_help_of_its_own(capsys):
    text, settings = shown(capsys, parse_sft, "-h")
    assert text.startswith("usage: trl-entropy sft ") and "merge_adapter" not in settings and "task" in settings
