"""Names and settings: what may be looked for, and where."""

import http.server
import threading

import pytest

import unilora_vllm
from unilora_core import SpecError
from unilora_vllm import Settings
from unilora_vllm.sources import find, sources_of, valid


@pytest.mark.parametrize("name", ["fr", "team/fr", "a.b-c_d", "org/repo/sub/fr-v1.2", "é"])
def test_names_that_may_be_looked_for(name):
    assert valid(name)


@pytest.mark.parametrize(
    "name",
    ["", "..", "../fr", "a/../fr", "a/..", "/etc/fr", "a//b", ".hidden", "a/.b", "a\\b", "a\n", "fr?x", "a%2e", "C:fr"],
)
def test_names_that_may_not(name):
    assert not valid(name)


def test_a_folder_has_names_with_folders_but_no_way_out(settings, tmp_path):
    (tmp_path / "files" / "team").mkdir()
    (tmp_path / "files" / "team" / "fr.safetensors").write_bytes(b"1")
    (tmp_path / "secret.safetensors").write_bytes(b"2")
    (tmp_path / "files" / "out.safetensors").symlink_to(tmp_path / "secret.safetensors")
    sources = sources_of(settings())
    assert find("team/fr", sources) == b"1"
    assert find("out", sources) is None
    assert find("team", sources) is None


UNREADABLE = {
    "no-http": (b"hello\r\n\r\n", r"BadStatusLine\('hello"),
    "nothing": (b"", "its server does not answer"),
    "cut-off": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\nabc", r"IncompleteRead\("),
    "endless": (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200, r"HTTPException\('got more than 100 headers'"),
}
"""Answers, and what is said of them."""


@pytest.fixture
def server(tmp_path):
    """The address of a server: ``fr`` is there, ``broken`` is its own error, and some answers are none."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if (name := self.path[len("/a/") : -len(".safetensors")]) in UNREADABLE:
                self.wfile.write(UNREADABLE[name][0])
                return
            code = {"/a/team/fr.safetensors": 200, "/a/broken.safetensors": 500}.get(self.path, 404)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b"data" if code == 200 else b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


def environment(**said):
    return {f"UNILORA_VLLM_{name}": str(value) for name, value in said.items()} | {"VLLM_PLUGINS": "unilora_resolver"}


def test_an_address(server):
    sources = sources_of(Settings.read(environment(URL=f"{server}/a/")))
    assert find("team/fr", sources) == b"data"
    assert find("de", sources) is None
    with pytest.raises(OSError, match="broken: its server answered 500"):
        find("broken", sources)


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_answer_that_cannot_be_read(server, name):
    with pytest.raises(OSError, match=f"^{name}: .*{UNREADABLE[name][1]}"):
        find(name, sources_of(Settings.read(environment(URL=f"{server}/a"))))


def test_an_address_that_is_none():
    with pytest.raises(OSError, match=r"^fr: .*nonnumeric port: 'x'"):
        find("fr", sources_of(Settings.read(environment(URL="http://127.0.0.1:x"))))


def test_an_address_that_does_not_answer():
    with pytest.raises(OSError, match="fr: its server does not answer"):
        find("fr", sources_of(Settings.read(environment(URL="http://127.0.0.1:9"))))


def test_the_hub_is_asked_for_its_own_names_only(monkeypatch, tmp_path):
    folder = tmp_path / "models--org--repo" / "snapshots" / "0" / "sub"
    folder.mkdir(parents=True)
    (folder / "fr.safetensors").write_bytes(b"cached")
    refs = tmp_path / "models--org--repo" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    sources = sources_of(Settings.read(environment(HF_REPO_LIST="org/repo, org/other")))
    assert find("org/repo/sub/fr", sources) == b"cached"
    assert find("org/repo/de", sources) is None
    assert find("org/repository/fr", sources) is None


def test_without_a_place_of_adapters_there_is_no_resolver(monkeypatch):
    assert Settings.read({"UNILORA_VLLM_MAX_RANK": "8", "UNILORA_VLLM_FOLDER": ""}) is None
    for name in ("FOLDER", "URL", "HF_REPO_LIST"):
        monkeypatch.delenv(f"UNILORA_VLLM_{name}", raising=False)
    unilora_vllm.register()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"FOLDER": "/nowhere"}, "UNILORA_VLLM_FOLDER: expected a folder, there is none at '/nowhere'"),
        ({"URL": "file:///etc"}, "UNILORA_VLLM_URL: expected an address of http or https, got 'file:///etc'"),
        ({"URL": "http://a", "DTYPE": "int8"}, "UNILORA_VLLM_DTYPE: expected float32, bfloat16, float16, got 'int8'"),
        ({"URL": "http://a", "CACHE_BYTES": "16G"}, "CACHE_BYTES: expected a whole number above 0, got '16G'"),
        ({"URL": "http://a", "MAX_RANK": "0"}, "UNILORA_VLLM_MAX_RANK: expected a whole number above 0, got '0'"),
    ],
)
def test_wrong_settings(said, message):
    with pytest.raises(SpecError, match=message):
        Settings.read(environment(**said))


@pytest.mark.parametrize("plugins", [{}, {"VLLM_PLUGINS": "lora_filesystem_resolver"}])
@pytest.mark.parametrize("said", [{"URL": "http://a"}, {"HF_REPO_LIST": "org/repo"}])
def test_fetching_must_be_meant(plugins, said):
    named = {f"UNILORA_VLLM_{name}": value for name, value in said.items()}
    with pytest.raises(SpecError, match="name the plugin: VLLM_PLUGINS=unilora_resolver"):
        Settings.read(named | plugins)
