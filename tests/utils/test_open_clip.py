"""CLIP weights from files and tags: OpenAI's archives read without running them, activations never guessed."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_clip import CONFIG, tiny_clip
from zs3fast.encoders.clip_vit import ClipViT
from zs3fast.encoders.config import vision_config
from zs3fast.encoders.open_clip_weights import load_clip_weights
from zs3fast.text import TextEncoder
from zs3fast.utils.errors import CheckpointError
from zs3fast.utils.open_clip import clip_model_config, clip_state, unreachable, uses_quick_gelu
from zs3fast.utils.torchscript import is_torchscript, read_torchscript

NAME = "ViT-tiny-test"


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The tiny CLIP as an architecture that open_clip knows, with GELU by name and tags of both kinds."""
    plain = {key: value for key, value in CONFIG.items() if key != "quick_gelu"}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, NAME, plain)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, f"{NAME}-quickgelu", {**plain, "quick_gelu": True})
    tags = {
        "openai": {"hf_hub": "them/tiny.openai/", "quick_gelu": True},
        "laion": {"hf_hub": "them/tiny.laion/", "url": "https://github.com/mlfoundations/x/tiny-laion-{digest}.pt"},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, NAME, tags)
    return NAME


class OpenAiClip(torch.nn.Module):
    """The layout of OpenAI's archives: half precision, and three numbers beside the weights."""

    def __init__(self) -> None:
        super().__init__()
        clip = tiny_clip()
        for name in ("visual", "transformer", "token_embedding", "ln_final"):
            setattr(self, name, getattr(clip, name))
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            self.register_parameter(name, torch.nn.Parameter(getattr(clip, name).data))
        for name, value in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openai") / "ViT-tiny.pt"
    model = OpenAiClip().eval().half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, torch.zeros(1), check_trace=False), path)
    return path


pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")


def test_an_archive_gives_the_tensors_of_its_module(archive: Path) -> None:
    state, expected = read_torchscript(archive), torch.jit.load(archive).state_dict()
    assert is_torchscript(archive) and state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) and state[name].dtype == expected[name].dtype for name in state)


def test_what_torch_saves_is_no_archive(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    (tmp_path / "junk").write_bytes(b"PK\x03\x04junk")
    assert not is_torchscript(tmp_path / "a.pt") and not is_torchscript(tmp_path / "junk")
    with pytest.raises(CheckpointError, match="a.pt: not a TorchScript archive"):
        read_torchscript(tmp_path / "a.pt")


def test_views_and_shared_storages(tmp_path: Path) -> None:
    class Views(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.arange(24.0).reshape(4, 6)
            self.register_buffer("whole", whole)
            self.register_buffer("part", whole[1:3, ::2])
            self.register_buffer("turned", whole.t())
            self.register_buffer("none", torch.empty(0, 3))
            self.register_buffer("scalar", torch.tensor(3, dtype=torch.int16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.save(torch.jit.script(Views()), tmp_path / "v.pt")
    state, expected = read_torchscript(tmp_path / "v.pt"), Views().state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code was run",))


@pytest.mark.parametrize("protocol", [2, 4])
def test_no_code_of_an_archive_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: int) -> None:
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as file:
        file.writestr("evil/data.pkl", pickle.dumps({"a": Evil()}, protocol))
        file.writestr("evil/constants.pkl", pickle.dumps((), 2))
    with pytest.raises(CheckpointError, match="evil.pt: .*it holds builtins.print|__builtin__.print"):
        read_torchscript(tmp_path / "evil.pt")
    assert "run" not in capsys.readouterr().out


def rewritten(archive: Path, target: Path, change: Any) -> Path:
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            data = change(entry.filename, old.read(entry))
            if data is not None:
                new.writestr(entry.filename, data)
    return target


@pytest.mark.parametrize(
    "change",
    [
        lambda name, data: data[:-2] if name.endswith("/data/0") else data,
        lambda name, data: None if name.endswith("/data/0") else data,
        lambda name, data: data[: len(data) // 2] if name.endswith("data.pkl") else data,
        lambda name, data: b"" if name.endswith("data.pkl") else data,
    ],
    ids=["short storage", "no storage", "half a pickle", "no pickle"],
)
def test_damaged_archives_are_one_error(archive: Path, tmp_path: Path, change: Any) -> None:
    with pytest.raises(CheckpointError, match="bad.pt: not a readable TorchScript archive"):
        read_torchscript(rewritten(archive, tmp_path / "bad.pt", change))


def test_openais_archive_runs_with_quick_gelu(archive: Path, named: str) -> None:
    """By a name that stands for GELU otherwise: both towers equal OpenAI's model, in its activation."""
    expected = tiny_clip().half().float()
    assert uses_quick_gelu(named, str(archive)) and vision_config(named, str(archive)).quick_gelu
    encoder = TextEncoder.from_open_clip(named, archive, cache=False)
    with torch.no_grad():
        sentence = open_clip.tokenize(["a photo of a cat"])
        want = torch.nn.functional.normalize(expected.encode_text(sentence), dim=-1)
        torch.testing.assert_close(encoder.encode(["cat"]), want, rtol=0, atol=1e-6)
    tower = ClipViT(vision_config(named, str(archive)), 64, double_class_embedding=False)
    load_clip_weights(tower, named, str(archive))
    torch.testing.assert_close(tower.state_dict()["conv1.weight"], expected.visual.conv1.weight.data)


def saved(path: Path, extra: dict[str, torch.Tensor] | None = None) -> str:
    state = {**tiny_clip().state_dict(), **(extra or {})}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_could_be_either_is_refused(tmp_path: Path, named: str, suffix: str) -> None:
    path = saved(tmp_path / f"clip{suffix}")
    message = f"does not say whether .*QuickGELU or GELU.*clip='{named}-quickgelu'.*--no-quick-gelu"
    with pytest.raises(ValueError, match=message):
        uses_quick_gelu(named, path)
    with pytest.raises(ValueError, match=message):
        TextEncoder.from_open_clip(named, path)
    for quick in (True, False):
        assert vision_config(named, path, quick).quick_gelu == quick
        TextEncoder.from_open_clip(named, path, quick_gelu=quick)
    assert uses_quick_gelu(f"{named}-quickgelu", path)
    assert uses_quick_gelu(CONFIG, path) and not uses_quick_gelu({**CONFIG, "quick_gelu": False}, path)


@pytest.mark.parametrize("quick", [True, False])
def test_files_that_open_clip_knows(tmp_path: Path, named: str, quick: bool) -> None:
    tag = "openai" if quick else "laion"
    cached = tmp_path / f"models--them--tiny.{tag}" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    assert uses_quick_gelu(named, saved(cached / "open_clip_model.safetensors")) == quick
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": quick}}))
    assert uses_quick_gelu(named, saved(folder / "weights.safetensors")) == quick
    assert uses_quick_gelu(named, tag) == quick


def test_openais_state_dict_is_known_by_its_extras(tmp_path: Path, named: str) -> None:
    extra = {name: torch.tensor(3) for name in ("input_resolution", "context_length", "vocab_size")}
    path = saved(tmp_path / "clip.pt", extra)
    assert uses_quick_gelu(named, path) and set(extra).isdisjoint(clip_state(named, path).text or extra)


def test_a_digest_is_proof_a_name_is_not(tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    path = saved(tmp_path / "clip.pt")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    for known, quick in ((digest, True), (digest[:8], False), ("0" * 64, None)):
        url = f"https://x/{known}/clip.pt" if len(known) == 64 else f"https://x/clip-{known}.pt"
        target = Path(path).rename(tmp_path / url.rsplit("/", 1)[1])
        tags = {"one": {"url": url, "quick_gelu": bool(quick)}, "two": {"quick_gelu": True}, "three": {}}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, named, tags)
        if quick is None:
            with pytest.raises(ValueError, match="does not say whether"):
                uses_quick_gelu(named, str(target))
        else:
            assert uses_quick_gelu(named, str(target)) == quick
        path = target


def test_an_architecture_whose_weights_are_all_alike_decides(tmp_path: Path, named: str) -> None:
    open_clip.pretrained._PRETRAINED[named] = {"laion": {"hf_hub": "them/tiny.laion/"}}
    assert not uses_quick_gelu(named, saved(tmp_path / "clip.pt"))


def test_wrong_weights_are_one_error_that_names_file_and_tower(tmp_path: Path) -> None:
    path = saved(tmp_path / "clip.pt")
    wide = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "width": 60}}
    with pytest.raises(ValueError, match="(?s)clip.pt' .* the image tower of this configuration.*wrong shape"):
        load_clip_weights(ClipViT(vision_config(wide), 64), wide, path)


@pytest.mark.usefixtures("named")
def test_offline_it_fails_within_seconds_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's own way takes most of a minute of silence."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://nowhere.invalid")
    start = time.perf_counter()
    with pytest.raises(ValueError, match="could not be fetched") as caught:
        clip_state(NAME, "openai")
    assert time.perf_counter() - start < 8
    for word in ("HF_HUB_OFFLINE=1", f"--pretrained FILE --clip {NAME}-quickgelu", "zs3fast demo", "nowhere.invalid"):
        assert word in str(caught.value)


def test_a_server_that_never_answers() -> None:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        start = time.perf_counter()
        reason = unreachable(f"http://127.0.0.1:{server.getsockname()[1]}", 0.3)
        assert reason is not None and time.perf_counter() - start < 3
    assert unreachable("http://127.0.0.1:1", 2) is not None


def test_weights_in_the_hubs_cache_need_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str) -> None:
    repository = tmp_path / "models--them--tiny.openai"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    saved(repository / "snapshots" / "abc" / "open_clip_model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://nowhere.invalid")
    state = clip_state(named, "openai")
    assert torch.equal(state.image["conv1.weight"], tiny_clip().visual.conv1.weight) and state.text is not None


def test_configurations_are_read_without_importing_open_clip() -> None:
    code = (
        "import sys; from zs3fast.utils.open_clip import clip_model_config; "
        "assert clip_model_config('ViT-B-16')['embed_dim'] == 512; assert 'open_clip' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert clip_model_config("ViT-B-16") == open_clip.get_model_config("ViT-B-16")
