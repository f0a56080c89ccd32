"""The page as a browser sees it: no error, no request, its numbers, and its few lines of script."""

import re
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from trainer.report import Facts, compare, render

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed"),
]
POLICY = re.compile('<meta http-equiv="Content-Security-Policy"[^>]*>')


def opened(address: str, folder: Path) -> tuple[str, str]:
    """The document after its scripts ran, and what the console said."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def written(page: str, folder: Path) -> str:
    (folder / "report.html").write_text(page, encoding="utf-8")
    return (folder / "report.html").as_uri()


def test_no_error_and_the_numbers(facts, tmp_path):
    seen, console = opened(written(render(facts), tmp_path), tmp_path)
    assert console == ""
    assert "<strong>75.0%</strong>" in seen
    assert "classified correctly: 9 of 12." in seen
    assert "<title>A run of &lt;script&gt;document.title='owned'&lt;/script&gt;</title>" in seen


def test_an_error_would_be_seen_and_a_foreign_script_does_not_run(facts, tmp_path):
    page = render(facts).replace("</h1>", "</h1><script>document.title = 'owned'</script>", 1)
    seen, console = opened(written(page, tmp_path), tmp_path)
    assert "Content Security Policy" in console
    assert "<title>owned</title>" not in seen


def test_names_are_not_run_even_without_a_policy(facts, tmp_path):
    page, found = POLICY.subn("", compare([facts, facts]))
    assert found == 1
    seen, console = opened(written(page, tmp_path), tmp_path)
    assert console == ""
    assert "<title>2 runs compared</title>" in seen


def test_tables_are_sorted_by_a_click(tmp_path):
    labels = np.repeat([0, 1, 2], [9, 10, 2])  # as text, 10 would come before 2 and 9
    page = POLICY.sub("", render(Facts("a run", ["a", "b", "c"], labels, np.eye(3)[labels])))

    def after(column: int, *, clicks: int) -> str:
        click = f"document.querySelector('#classes th:nth-child({column}) button').click();" * clicks
        altered = page.replace("</body>", f"<script>{click}</script></body>")
        seen, console = opened(written(altered, tmp_path), tmp_path)
        assert console == ""
        return "".join(re.findall(r"<tr><td>(\w)</td>", seen[seen.index('<section id="classes">') :])[:3])

    assert after(1, clicks=1) == "abc"
    assert after(1, clicks=2) == "cba"
    assert after(2, clicks=1) == "bac"
    assert after(2, clicks=2) == "cab"


def test_pictures_appear_under_the_pointer(facts, tmp_path):
    move = "new PointerEvent('pointermove', {bubbles: true, clientX: 50, clientY: 50})"
    script = f"<script>document.querySelector('circle[data-src]').dispatchEvent({move})</script></body>"
    page = POLICY.sub("", render(facts)).replace("</body>", script)
    seen, console = opened(written(page, tmp_path), tmp_path)
    assert console == ""
    assert re.search(r'<div class="tip" style="[^"]+"><img src="data:image/jpeg;base64,', seen)


def test_nothing_else_is_requested(facts, tmp_path):
    requests = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format, *arguments):
            requests.append(self.path)

    written(render(facts), tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        seen, console = opened(f"http://127.0.0.1:{server.server_port}/report.html", tmp_path)
        server.shutdown()
    assert (console, requests) == ("", ["/report.html"])
    assert "<strong>75.0%</strong>" in seen


@pytest.mark.parametrize("width", [360, 1000])
def test_nothing_is_wider_than_the_window(facts, changed, tmp_path, width):
    long = changed(classes=["x" * 200, "a few words " * 20, "c"], settings={"y" * 300: "z" * 3000}, command="w" * 1000)
    script = f"""<script>
    const box = document.createElement("div");
    box.style = "width: {width}px; overflow: hidden";
    box.append(...document.body.childNodes);
    document.body.append(box);
    document.title = box.scrollWidth;
    </script></body>"""
    for page in (render(long), compare([facts, long, changed(logits=-facts.logits)])):
        seen, _ = opened(written(POLICY.sub("", page).replace("</body>", script), tmp_path), tmp_path)
        assert f"<title>{width}</title>" in seen
