"""What README.md tells people to type exists: the blocks that .ci/run executes, the files and the flags."""

import re
import shlex
from pathlib import Path

from accelerate.commands.launch import launch_command_parser

from trainer.__main__ import parse
from trainer.cli import flags

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAIN = "accelerate launch --config_file accelerate_configs/cpu.yaml train.py"
# A word of a command is a file of this repository if it begins or ends like one; data, runs and checkpoints are not.
OUR_PATH = re.compile(
    r"(\./)?(accelerate_configs|benchmarks|docs|examples|tests|trainer|\.ci)/.*|\w[\w./-]*\.(py|md|toml)"
)


def commands(text, *, marker=None):
    """The simple commands of the ```bash blocks (of the one after `<!-- ci: MARKER -->`), each a list of words."""
    before = rf"^<!-- ci: {marker} -->\n+" if marker else "^"
    found = []
    for block in re.findall(before + r"```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
            lexer.whitespace_split = True
            command = []
            for word in lexer:
                if set(word) <= set("&|;"):
                    found.append(command)
                    command = []
                else:
                    command.append(word)
            found.append(command)
    return [command for command in found if command]


def missing_paths(text):
    words = {word for command in commands(text) for word in command}
    links = set(re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text))
    return sorted(path for path in links | set(filter(OUR_PATH.fullmatch, words)) if not list(ROOT.glob(path)))


def flags_of(words):
    return [word.split("=")[0] for word in words if word.startswith("--")]


def launcher_and_train_flags(text):
    """`--flags` of the commands that start train.py: those before it, which the launcher reads, and those after it."""
    before, after = set(), set()
    for command in commands(text):
        if "train.py" in command:
            at = command.index("train.py")
            before.update(flags_of(command[:at]))
            after.update(flags_of(command[at + 1 :]))
    return before, after


def test_first_block_installs_and_trains():
    blocks = re.findall(r"^<!-- ci: (\w+) -->\n+```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in blocks][:2] == ["run", "test"]
    assert blocks[0][1] == f"python -m venv .venv && . .venv/bin/activate && pip install -e . && {TRAIN}\n"
    assert README.index(blocks[0][1]) == README.index("```bash\n") + len("```bash\n")  # nothing to type before it


def test_second_block_installs_and_tests():
    words = [" ".join(command) for command in commands(README, marker="test")]
    assert words[:3] == ["python -m venv .venv", ". .venv/bin/activate", "pip install -e .[test]"]
    assert words[3].split()[0] == "pytest"


def test_uv_block_installs_the_same_and_trains():
    words = [" ".join(command) for command in commands(README, marker="uv")]
    assert words[:3] == ["uv venv", ". .venv/bin/activate", "uv pip install -e .[test]"]
    assert TRAIN in words


def test_ci_markers_are_known():
    """A misspelt marker would leave its block untested without a word."""
    markers = re.findall(r"<!--\s*ci\b.*?-->", README)
    assert markers == ["<!-- ci: run -->", "<!-- ci: test -->", "<!-- ci: uv -->"]


def test_no_install_command_asks_for_a_version():
    installs = [command for command in commands(README) if "install" in command]
    assert installs
    assert [command for command in installs if re.search(r"[=<>~]=|[<>]", " ".join(command))] == []


def test_paths_exist():
    assert missing_paths(README) == []


def test_path_check_finds_what_is_missing():
    text = "[a](docs/absent.md) [b](https://x.org/y.md)\n```bash\npython trian.py /tmp/x.py && cat README.md\n```\n"
    assert missing_paths(text) == ["docs/absent.md", "trian.py"]


def test_launcher_flags_exist():
    used, _ = launcher_and_train_flags(README)
    assert "--config_file" in used
    assert used <= set(launch_command_parser()._option_string_actions)


def test_train_flags_exist():
    _, used = launcher_and_train_flags(README)
    assert used <= flags()


def test_flags_are_found_on_both_sides_of_train():
    text = "```bash\nmkdir -p x && accelerate launch \\\n  --cpu train.py --lr 1 --data=x | tee --append f\n```\n"
    assert launcher_and_train_flags(text) == ({"--cpu"}, {"--lr", "--data"})


def test_commands_of_the_package_can_be_parsed():
    found = [
        command[command.index("trainer") + 1 :] for command in commands(README) if "-m trainer" in " ".join(command)
    ]
    assert {type(parse(words)).__name__ for words in found} == {
        "Audit",
        "Inspect",
        "Verify",
        "Evaluate",
        "Predict",
        "Export",
        "Report",
    }
