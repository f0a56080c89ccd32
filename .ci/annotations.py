"""Print the number of pyright's errors in each file, and fail where there are more than the limit, a ratchet.

    python .ci/annotations.py

`pyright FILE` names the errors themselves; `[tool.pyright]` in pyproject.toml has the settings.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 0

if __name__ == "__main__":
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 1):  # 1: there are errors
        raise SystemExit(f"pyright failed with exit code {done.returncode}:\n{done.stdout}")
    found = [one for one in json.loads(done.stdout)["generalDiagnostics"] if one["severity"] == "error"]
    for file, count in Counter(Path(one["file"]).relative_to(ROOT).as_posix() for one in found).most_common():
        print(f"{count:6,}  {file}")
    print(f"{len(found):6,} of {LIMIT:6,}  errors of pyright{'  TOO MANY' * (len(found) > LIMIT)}")
    raise SystemExit(1 if len(found) > LIMIT else 0)
