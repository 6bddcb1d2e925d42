"""The text tower against open_clip's own CLIP, its cache, and what it says of weights it cannot have."""

from __future__ import annotations

import logging

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tests.tiny_clip import CONFIG, text_state, tiny_clip
from zs3fast.text import MULTI, TextEncoder


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


def by_hand(clip, names, templates):
    """Encode each sentence with CLIP itself, normalise, average over templates, normalise; then the same over names."""
    rows = []
    with torch.no_grad():
        for name in names:
            tokens = open_clip.tokenize([template.format(name) for template in templates])
            sentences = F.normalize(clip.encode_text(tokens), dim=-1)
            rows.append(F.normalize(sentences.mean(0), dim=0))
    return torch.stack(rows)


@pytest.mark.parametrize("prefix", ["", "text_encoder."], ids=["open_clip", "official"])
@pytest.mark.parametrize("templates", ["single", "multi"])
def test_encode_equals_clip(clip, prefix, templates):
    encoder = TextEncoder.from_state_dict(text_state(clip, prefix), cache=False)
    names = ["cat", "potted plant", "wall-concrete"]
    expected = by_hand(clip, names, ["a photo of a {}"] if templates == "single" else MULTI)
    torch.testing.assert_close(encoder.encode(names, templates), expected, rtol=0, atol=1e-6)


def test_a_whole_clip_state_dict_and_halves_will_do(clip):
    halves = {key: value.half() for key, value in clip.state_dict().items()}
    encoder = TextEncoder.from_state_dict(halves, cache=False)
    got = encoder.encode(["cat"])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, by_hand(clip, ["cat"], ["a photo of a {}"]), rtol=0, atol=3e-3)


def test_synonyms_are_averaged_and_renormalised(clip):
    encoder = TextEncoder.from_state_dict(text_state(clip), cache=False)
    apart = encoder.encode(["sofa", "couch", "cat"], "multi")
    together = encoder.encode(["sofa, couch", "cat"], "multi")
    torch.testing.assert_close(together[0], F.normalize(apart[:2].mean(0), dim=0), rtol=0, atol=1e-6)
    torch.testing.assert_close(together[1], apart[2], rtol=0, atol=1e-6)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))


def test_tokens_before_the_projection(clip):
    """The end token after the last norm: projected and normalised it is CLIP's embedding; on its own it is not unit."""
    encoder = TextEncoder.from_state_dict(text_state(clip), cache=False)
    names = ["cat", "potted plant", "wall-concrete"]
    got = encoder.encode(names, text_token="pre_projection")
    assert got.shape == (3, 64)
    torch.testing.assert_close(
        F.normalize(got @ clip.text_projection, dim=-1), encoder.encode(names), rtol=0, atol=1e-6
    )
    assert (got.norm(dim=-1) - 1).abs().min() > 0.1
    several = encoder.encode([("cat", "potted plant")], ["a {}", "the {}"], text_token="pre_projection")
    apart = [encoder.encode(names[:2], [t], text_token="pre_projection") for t in ("a {}", "the {}")]
    torch.testing.assert_close(several[0], torch.cat(apart).mean(0), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="text_token: expected one of projected, pre_projection, got 'raw'"):
        encoder.encode(names, text_token="raw")
    other = TextEncoder(torch.nn.Linear(77, 4), encoder.tokenizer, cache=False)
    with pytest.raises(ValueError, match="text_token: 'pre_projection' needs a CLIP text tower .* got Linear"):
        other.encode(names, text_token="pre_projection")


def test_batches_do_not_matter(clip):
    names = ["thing", "another thing", "one more very odd thing"]
    whole = TextEncoder.from_state_dict(text_state(clip), cache=False).encode(names, "multi")
    split = TextEncoder.from_state_dict(text_state(clip), cache=False, batch_size=4).encode(names, "multi")
    torch.testing.assert_close(whole, split, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        TextEncoder.from_state_dict(text_state(clip), batch_size=0)


def test_activation_and_heads_change_the_result(clip):
    state = text_state(clip)
    quick = TextEncoder.from_state_dict(state, cache=False).encode(["cat"])
    gelu = TextEncoder.from_state_dict(state, cache=False, quick_gelu=False).encode(["cat"])
    two_heads = TextEncoder.from_state_dict(state, cache=False, heads=2).encode(["cat"])
    assert (quick - gelu).abs().max() > 1e-4 and (quick - two_heads).abs().max() > 1e-4
    with pytest.raises(ValueError, match="heads: expected a divisor of the text tower's width 64, got 5"):
        TextEncoder.from_state_dict(state, heads=5)


def test_bad_state_dicts_are_reported_in_lists(clip):
    state = text_state(clip)
    with pytest.raises(ValueError, match="missing .*ln_final.weight"):
        TextEncoder.from_state_dict({key: value for key, value in state.items() if "ln_final" not in key})
    with pytest.raises(ValueError, match=r"missing \(1\): transformer.resblocks.1.ln_1.bias"):
        TextEncoder.from_state_dict({k: v for k, v in state.items() if k != "transformer.resblocks.1.ln_1.bias"})
    wrong = {**state, "ln_final.bias": torch.zeros(3), "transformer.resblocks.0.odd": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"(?s)unexpected \(1\): transformer.resblocks.0.odd.*: ln_final.bias \[3\]"):
        TextEncoder.from_state_dict(wrong)
    with pytest.raises(ValueError, match=r"wrong rank of text_projection \[64\]"):
        TextEncoder.from_state_dict({**state, "text_projection": torch.zeros(64)})
    with pytest.raises(ValueError, match="unexpected .*'visual.proj'"):
        TextEncoder.from_state_dict({**text_state(clip, "text_encoder."), "text_encoder.visual.proj": torch.zeros(1)})


def test_too_long_a_name_is_refused_not_cut(clip):
    encoder = TextEncoder.from_state_dict(text_state(clip), cache=False)
    fits = " ".join(["cat"] * 71)  # with "a photo of a", start and end: 77 tokens
    assert torch.isfinite(encoder.encode([fits])).all()
    with pytest.raises(ValueError, match=r"classes: expected at most 77 tokens, the text tower's, got"):
        encoder.encode([fits + " cat"])


def test_another_tokenizer_is_used(clip):
    asked = []

    def tokenizer(sentences):
        asked.extend(sentences)
        return open_clip.tokenize(sentences)

    encoder = TextEncoder.from_state_dict(text_state(clip), tokenizer=tokenizer, cache=False)
    encoder.encode(["cat", "a, b"], ["the {}"])
    assert asked == ["the cat", "the a", "the b"]


def test_cache_gives_back_the_same_bits(clip, cache, monkeypatch):
    encoder = TextEncoder.from_state_dict(text_state(clip), name="tiny")
    first = encoder.encode(["cat", "dog"])
    assert len(list(cache.glob("*.safetensors"))) == 1
    monkeypatch.setattr(encoder, "_encode", lambda *args: pytest.fail("computed again"))
    assert torch.equal(encoder.encode(["cat", "dog"]), first)


def test_cache_is_never_stale(clip, cache):
    state = text_state(clip)
    encoder = TextEncoder.from_state_dict(state, name="tiny")
    fresh = TextEncoder.from_state_dict(state, name="tiny", cache=False)

    def agree(*args):
        got, expected = encoder.encode(*args), fresh.encode(*args)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)

    agree(["cat", "dog"])
    agree(["dog", "cat"])  # order
    agree(["cat, dog"])  # synonyms
    agree([("cat", "dog"), "cow"])
    agree(["cat", "dog"], "multi")
    agree(["cat", "dog"], ["the {}"])
    assert encoder.encode(["cat", "dog"], text_token="pre_projection").shape == (2, 64)  # of the same sentences
    agree(["cat", "dog"])
    with torch.no_grad():  # weights, even when written in a way torch does not count
        encoder.tower.ln_final.weight.data.mul_(1.5)
        encoder.tower.ln_final.bias.data.add_(0.3)
        fresh.tower.ln_final.weight.data.mul_(1.5)
        fresh.tower.ln_final.bias.data.add_(0.3)
    agree(["cat", "dog"])
    before = len(list(cache.iterdir()))
    TextEncoder.from_state_dict(state, name="other").encode(["cat", "dog"])  # another name for the weights
    TextEncoder.from_state_dict(state, name="tiny", quick_gelu=False).encode(["cat", "dog"])
    TextEncoder.from_state_dict(state, name="tiny", heads=2).encode(["cat", "dog"])
    assert len(list(cache.iterdir())) == before + 3


def corrupt_bytes(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 0xFF  # inside the numbers
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def another_key(path):
    save_file(load_file(path), path, {"key": "{}", "sha256": "0"})


@pytest.mark.parametrize("damage", [corrupt_bytes, truncate, empty, another_key])
def test_a_corrupt_cache_file_is_computed_again(clip, cache, caplog, damage):
    encoder = TextEncoder.from_state_dict(text_state(clip), name="tiny")
    good = encoder.encode(["cat"])
    (path,) = cache.iterdir()
    damage(path)
    with caplog.at_level(logging.WARNING, "zs3fast"):
        assert torch.equal(encoder.encode(["cat"]), good)
    assert "computing these text embeddings again" in caplog.text
    assert torch.equal(load_file(path)["text_embeddings"], good)
    assert len(list(cache.iterdir())) == 1  # no temporary files stay behind


def test_a_cache_that_cannot_be_written_only_warns(clip, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ZS3FAST_CACHE", str(tmp_path / "file"))
    encoder = TextEncoder.from_state_dict(text_state(clip), name="tiny")
    with caplog.at_level(logging.WARNING, "zs3fast"):
        assert encoder.encode(["cat"]).shape == (1, 32)
    assert "were not cached" in caplog.text


def test_from_open_clip_dict_with_a_file(clip, tmp_path):
    path = tmp_path / "clip.pt"
    torch.save(clip.state_dict(), path)
    encoder = TextEncoder.from_open_clip(CONFIG, path, cache=False)
    torch.testing.assert_close(encoder.encode(["cat"]), by_hand(clip, ["cat"], ["a photo of a {}"]), rtol=0, atol=1e-6)


def test_unknown_clip_lists_close_names():
    with pytest.raises(ValueError, match="clip: expected a model of open_clip, such as .*ViT-B-16.*, got 'ViT-B16'"):
        TextEncoder.from_open_clip("ViT-B16")
    with pytest.raises(ValueError, match="clip: the configuration lacks text_cfg"):
        TextEncoder.from_open_clip({"embed_dim": 3, "vision_cfg": {}})


def test_unknown_tag_lists_the_tags():
    with pytest.raises(
        ValueError, match=r"pretrained: expected a file or a tag of this model \(openai, .*, got 'opneai'"
    ):
        TextEncoder.from_open_clip("ViT-B-16", "opneai")


def test_a_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "junk.pt"
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="pretrained: open_clip could not read .*junk.pt"):
        TextEncoder.from_open_clip("ViT-S-32-alt", path)


def test_weights_that_cannot_be_fetched(monkeypatch, tmp_path, caplog):
    """Without network: one error that says how to get the weights, and no word from the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="could not be fetched. Run once with network access") as caught:
        TextEncoder.from_open_clip("ViT-B-16", "openai")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert "\n" not in str(caught.value)
    assert not caplog.records


def test_random_weights_say_so_and_are_not_cached(cache, caplog):
    with caplog.at_level(logging.WARNING):
        encoder = TextEncoder.from_open_clip(CONFIG)
    assert [record.getMessage() for record in caplog.records] == [
        "the text tower of CLIP has random weights: its embeddings mean nothing"
    ]
    encoder.encode(["cat"])
    assert not cache.exists()
