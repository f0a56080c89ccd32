"""What patterns name, and rules in files: read, refused, written."""

import json

import pytest
import yaml

from trainer.errors import UsageError
from trainer.model import expressions
from trainer.model import patterns as rules

NAMES = ["stem.weight", "layer1.0.conv.weight", "layer1.0.bn.weight", "layer1.0.bn.bias", "layer1.1.conv.weight"]
NAMES += ["layer2.0.conv.weight", "layer2.0.bn.bias", "fc.weight", "fc.bias"]
CHILDREN = {"": ["stem", "relu", "layer1", "layer2", "fc"], "layer1": ["0", "1"], "layer1.0": ["conv", "bn"]}
CHILDREN |= {"layer1.1": ["conv"], "layer2": ["0"], "layer2.0": ["conv", "bn"], "stem": [], "relu": [], "fc": []}


def named(pattern: str, **options: object) -> list[str]:
    return rules.named(pattern, NAMES, children=CHILDREN, **options)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("fc", NAMES[7:]),
        ("fc.bias", NAMES[8:]),
        ("layer1.0", NAMES[1:4]),
        ("layer", []),
        ("", []),
        ("layer*", NAMES[1:7]),
        ("layer[2-9]", NAMES[5:7]),
        ("*.bn", [NAMES[2], NAMES[3], NAMES[6]]),
        ("*.bias", [NAMES[3], NAMES[6], NAMES[8]]),
        ("re:layer[12]\\.0\\.bn", [NAMES[2], NAMES[3], NAMES[6]]),
        ("re:.*bias", [NAMES[3], NAMES[6], NAMES[8]]),
        ("re:layer", []),  # the whole name of a module, not a part of one
        ("[:2]", NAMES[:1]),
        ("[2:]", NAMES[1:]),
        ("[-1:]", NAMES[7:]),
        ("[2:4]", NAMES[1:7]),
        ("layer1[1:]", [NAMES[4]]),
        ("layer1[5:]", []),
        ("layer*[0:1].bn", [NAMES[2], NAMES[3], NAMES[6]]),
        ("[2:4][0:1].conv", [NAMES[1], NAMES[5]]),
        ("parameters[0:2]", NAMES[:2]),
        ("parameters[:-7]", NAMES[:2]),
        ("parameters[-2:]", NAMES[7:]),
        ("parameters[:]", NAMES),
        ("parameters[5:2]", []),
        ("all", NAMES),
        ("head", []),
    ],
)
def test_what_a_pattern_names(pattern, found):
    assert named(pattern) == found


def test_head_is_a_word_where_the_head_is_known_and_a_name_elsewhere():
    assert named("head", head=["fc"]) == NAMES[7:]
    assert rules.named("head", ["head.weight"], children={}) == ["head.weight"]


@pytest.mark.parametrize("pattern", ["re:(", "re:a{99999999999999999999}"])
def test_what_is_no_regular_expression(pattern):
    with pytest.raises(UsageError, match="is not a regular expression"):
        named(pattern)


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_written_rules_are_read_again_and_can_be_edited(tmp_path, suffix):
    path, said = tmp_path / f"plan{suffix}", ("freeze:re:.*\\.bn", "freeze:layer1", "head", "layer*", "freeze:é")
    rules.write(path, said)
    assert rules.read(path) == said
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    content = (json.loads if suffix == ".json" else yaml.safe_load)(path.read_text(encoding="utf-8"))
    assert content["rules"][1] == {"train": ["head", "layer*"]}
    content["rules"][1]["train"] = "fc"
    path.write_text(json.dumps(content) if suffix == ".json" else yaml.safe_dump(content))
    assert rules.read(path) == (*said[:2], "fc", "freeze:é")


def test_a_list_names_what_is_frozen(tmp_path):
    path = tmp_path / "names.json"
    path.write_text('["stem.weight", "layer1.0.conv.weight"]')
    assert rules.read(path) == ("freeze:stem.weight", "freeze:layer1.0.conv.weight", "all")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rules: [{train: fc, freeze: stem}]", "rule 1 of .* is {'freeze': 'stem', 'train': 'fc'}; expected train: or"),
        ("rules: [{train: fc}, {thaw: stem}]", "rule 2 of"),
        ("rules: [{train: fc}, {train: [1]}]", "rule 2 of"),
        ("rules: [{train: --overwrite}]", "rule 1 of"),  # it would be a flag
        ("rules: [fc]", "rule 1 of"),
        ("rules: fc", "expected rules: with a list"),
        ("{train: [fc], trainable: [fc.weight]}", "holds train, trainable; expected rules:"),
        ("[1, 2]", "holds list"),
        *[(text, "is empty; expected rules: with a list") for text in ("", "[]", "{}", "rules: []", "rules:")],
        ("rules: [", "is not plain YAML or JSON"),
        ("rules: !!python/object/apply:os.system ['true']", "is not plain YAML or JSON"),
        ("\0", "is not plain YAML or JSON"),
    ],
)
def test_other_content_is_refused(tmp_path, text, says):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        rules.read(path)


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "missing.yaml"):
        with pytest.raises(UsageError, match="cannot read the freeze plan"):
            rules.read(path)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        rules.write(tmp_path / "plan.json", ["fc"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("pattern", ["re:(a+)+!", "re:(a|a)*!", "re:(.*)*!", "re:a*a*a*a*a*a*a*a*a*a*a*a*!"])
def test_an_expression_that_would_take_years_is_refused(pattern, monkeypatch):
    monkeypatch.setattr(expressions, "_SECONDS", 0.5)
    with pytest.raises(UsageError, match=r"takes more than 0.5 s to match 1 name: simplify it"):
        rules.named(pattern, ["a" * 80], children={})


def test_wildcards_take_no_time():
    assert rules.named("*a" * 12 + "!", ["a" * 80], children={}) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"stem.weight": 0, "fc": 0}', ("freeze:stem.weight", "freeze:fc", "all")),
        ('{"stem.weight": false, "fc": true}', ("freeze:stem.weight", "fc", "all")),
        ('{"stem.weight": 1}', ("stem.weight", "all")),
        ('{"rules": 0}', ("freeze:rules", "all")),
        ("stem.weight: 0\nfc.bias: 1", ("freeze:stem.weight", "fc.bias", "all")),
    ],
)
def test_names_with_0_or_1(tmp_path, text, found):
    path = tmp_path / "plan.json"
    path.write_text(text)
    assert rules.read(path) == found


@pytest.mark.parametrize("text", ['{"stem.weight": 2}', '{"stem.weight": 0, "fc": "yes"}', '{"stem.weight": 0.5}'])
def test_names_with_other_numbers_are_refused_for_the_true_reason(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"holds stem.weight.*or a name with 0 or 1 for each"):
        rules.read(path)


def test_a_large_file_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("\n".join(f"k{number}: 0" for number in range(10**6)))
    with pytest.raises(UsageError, match=r"cannot read the freeze plan .*it has more than 1,048,576 bytes"):
        rules.read(path)


def test_a_message_does_not_repeat_what_yaml_repeats(tmp_path):
    path = tmp_path / "plan.yaml"
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    path.write_text("rules:\n  - {" + ", ".join(lines) + "}")
    with pytest.raises(UsageError, match="rule 1 of") as error:
        rules.read(path)
    assert len(str(error.value)) < 2000
