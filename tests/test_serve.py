"""The served report: it follows its runs, and gives away nothing but itself."""

import errno
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import pytest
import report_store

from gradflow import serve
from gradflow.errors import GradflowError
from gradflow.serve import Live
from gradflow.store import load_runs


def ask(url, path="/", method="GET", **headers):
    """Status, headers and content of a request, whose path is sent as it is."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def version(url):
    return json.loads(ask(url, "/version")[2])


@pytest.fixture
def small(tmp_path):
    """A report's directory with files of every kind, and files that are none of it."""
    out = tmp_path / "report"
    for name in ("figures", "tables", ".cache"):
        (out / name).mkdir(parents=True)
    (out / "index.html").write_text("<p>the page</p>")
    (out / "atlas.html").write_text("<p>the atlas</p>")
    (out / "figures" / "one.svg").write_text("<svg/>")
    (out / "tables" / "runs.csv").write_text("a,b\n")
    (out / ".cache" / "run.html").write_text("kept")
    (out / "figures" / ".hidden.svg").write_text("hidden")
    (tmp_path / "secret.html").write_text("secret")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.svg").write_text("secret")
    (out / "figures" / "link.svg").symlink_to(tmp_path / "secret.html")
    (out / "linked").symlink_to(tmp_path / "outside")
    return out


@pytest.fixture
def live(small, tmp_path):
    with Live([str(tmp_path / "runs")], small, lambda: small / "index.html", port=0) as found:
        found.look()
        yield found


def test_a_report_is_served_with_its_types_and_for_nobody_to_keep(live):
    for path, kind, content in (
        ("/", "text/html; charset=utf-8", b"<p>the page</p>"),
        ("/index.html?x=1", "text/html; charset=utf-8", b"<p>the page</p>"),
        ("/atlas.html", "text/html; charset=utf-8", b"<p>the atlas</p>"),
        ("/figures/one.svg", "image/svg+xml", b"<svg/>"),
        ("/tables/runs.csv", "text/csv; charset=utf-8", b"a,b\n"),
    ):
        status, headers, body = ask(live.url, path)
        assert (status, headers["Content-Type"], body) == (200, kind, content)
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert headers["Access-Control-Allow-Origin"] is None
    status, headers, body = ask(live.url, method="HEAD")
    assert (status, headers["Content-Length"], body) == (200, "15", b"")


@pytest.mark.parametrize("path", [
    "/../secret.html", "/figures/../../secret.html", "/%2e%2e/secret.html",
    "/figures/%2e%2e/%2e%2e/secret.html", "/figures/..%2f..%2fsecret.html", "//etc/passwd",
    "/%2fetc/passwd", "/etc/passwd", "/..%5csecret.html", "/figures/link.svg",
    "/linked/secret.svg", "/figures/.hidden.svg", "/.cache/run.html", "/figures/", "/figures",
    "/index.html/", "/index.html%00.svg", "/nothing.html", "/tables/runs.csv/..", "/%ff",
    "/figures/one.svg%0d%0aX-Own:%201", "/version/",
])  # fmt: skip
def test_what_is_not_the_report_is_not_served(live, path):
    status, headers, body = ask(live.url, path)
    assert (status, body) == (404, b"not part of this report\n")
    assert headers["X-Own"] is None


def test_a_report_in_a_linked_directory_is_served(small, tmp_path):
    (tmp_path / "other").symlink_to(small)
    make = small.joinpath
    with Live([], tmp_path / "other", lambda: make("index.html"), port=0) as live:
        live.look()
        assert ask(live.url, "/figures/one.svg")[0] == 200
        assert ask(live.url, "/figures/link.svg")[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(live, method):
    status, headers, _ = ask(live.url, method=method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(("host", "status"), [
    ("127.0.0.1", 200), ("localhost:8000", 200), ("LOCALHOST", 200), ("[::1]:1", 200),
    ("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403),
    ("127.0.0.1.evil.example", 403), ("", 403),
])  # fmt: skip
def test_only_names_of_this_machine_are_answered_to(live, host, status):
    for path in ("/", "/version", "/nothing"):
        found = ask(live.url, path, Host=host)[0]
        assert found == (404 if status == 200 and path == "/nothing" else status)


def test_it_listens_on_loopback_and_says_where_it_cannot(live):
    assert urlsplit(live.url).hostname == "127.0.0.1"
    port = urlsplit(live.url).port
    with pytest.raises(GradflowError, match=rf"127\.0\.0\.1:{port}: cannot listen there .*--port"):
        Live([], "report", lambda: None, port=port)
    with pytest.raises(GradflowError, match="--port=70000: 0 to 65535"):
        Live([], "report", lambda: None, port=70000)
    with pytest.raises(GradflowError, match=r"no\.such\.host\.invalid:0: cannot listen"):
        Live([], "report", lambda: None, host="no.such.host.invalid", port=0)


def test_the_page_follows_the_runs(tmp_path, monkeypatch):
    """From no store at all, over a run, a run that grows, to one that is gone."""
    monkeypatch.setattr(serve, "REST", 0.0)
    runs, out, made = tmp_path / "runs", tmp_path / "report", []

    def make():
        found = load_runs(runs)
        if not len(found):
            raise GradflowError("no runs <yet>")
        made.append(sum(len(run.table("weights")) for run in found))
        out.mkdir(exist_ok=True)
        (out / "index.html").write_text(f"page {made}")
        return out / "index.html"

    with Live([str(runs)], out, make, port=0) as live:
        assert ask(live.url)[0] == 200
        assert not live.look()
        assert version(live.url) == {"version": ""}
        runs.mkdir()
        assert not live.look()
        assert b"Waiting for runs: no runs &lt;yet&gt;." in ask(live.url)[2]
        one = report_store.write_run(runs, depth=8, skip="none", steps=4)
        assert live.look()
        first = version(live.url)
        assert ask(live.url)[2] == f"page {made}".encode()
        made_at = datetime.fromisoformat(first["made"])
        assert timedelta(0) <= datetime.now(UTC) - made_at < timedelta(minutes=5)
        assert not live.look()  # nothing has changed
        with report_store.RunWriter(runs / "own", {}, origin="external") as writer:
            table = load_runs(runs).members[0].table("weights")
            writer.append("weights", table)
            assert live.look()
            second = version(live.url)
            writer.append("weights", table)
            assert live.look()
            assert made[-1] == made[-2] + len(table)
        assert live.look()  # it has ended
        assert len({first["version"], second["version"], version(live.url)["version"]}) == 3
        for path in one.iterdir():
            path.unlink()
        one.rmdir()
        assert live.look()
        assert made[-1] == 2 * len(table)


def test_a_report_that_fails_is_told_in_a_line_and_the_old_one_stays(
    tmp_path, small, monkeypatch, capsys
):
    monkeypatch.setattr(serve, "REST", 0.0)
    monkeypatch.setattr(serve, "AGAIN", 0.0)
    broken = [False]

    def make():
        if broken[0]:
            raise ZeroDivisionError("in the middle")
        return small / "index.html"

    with Live([str(tmp_path / "runs")], small, make, port=0) as live:
        live.look()
        before = version(live.url)
        report_store.write_run(tmp_path / "runs", depth=8, skip="none")
        broken[0] = True
        assert not live.look()
        assert not live.look()
        assert version(live.url) == before
        assert ask(live.url)[2] == b"<p>the page</p>"
        broken[0] = False
        assert live.look()
    told = capsys.readouterr().err
    assert told == "gradflow: no report could be made (ZeroDivisionError: in the middle)\n"


def command(tmp_path, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "gradflow.report", str(tmp_path / "runs"), "--serve", "--out",
         str(tmp_path / "report"), *options],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_end(tmp_path, kind):
    report_store.write_run(tmp_path / "runs", depth=8, skip="none")
    process = command(tmp_path, "--port", "0")
    try:
        url = process.stdout.readline().split()[0]
        if kind == signal.SIGINT:  # the other in the middle of the first report
            assert process.stdout.readline().endswith("report made\n")
            assert len(version(url)["version"]) == 64
            assert b"gradflow report" in ask(url)[2]
        process.send_signal(kind)
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    assert not list((tmp_path / "report").glob(".new-*"))


def test_an_interrupt_within_a_librarys_exec_ends_it_as_any_other(tmp_path):
    (tmp_path / "serving.py").write_text(
        "import sys; from gradflow import serve\n"
        "serve.Live.look = lambda self: exec('raise KeyboardInterrupt')\n"
        "sys.exit(serve.serve(['.'], 'report', lambda: None, host='127.0.0.1', port=0))"
    )
    command = [sys.executable, "-m", "serving"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_command_says_that_a_port_is_taken(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = command(tmp_path, "--port", str(port))
        out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out == ""
    refused = os.strerror(errno.EADDRINUSE)
    where = f"127.0.0.1:{port}: cannot listen there ({refused})"
    assert err == f"gradflow: {where}; --port 0 takes any port\n"
