"""Configurations: every published file loads, wrong keys and values are named, files come back as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from zs3fast.training.config import changed_keys, from_dict, list_configs, load_config, save_config
from zs3fast.training.settings import SettingsError


@pytest.mark.parametrize("name", list_configs())
def test_published_settings_load_and_come_back(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.name == name or "small" in name
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_every_published_setting_is_there() -> None:
    names = set(list_configs())
    for method in ("zegclip", "tagclip", "clip_rc"):
        for dataset in ("voc20", "coco171", "context60"):
            for setting in ("inductive", "transductive", "supervised"):
                assert f"{method}_{dataset}_{setting}" in names
    assert {"clsclip_voc5i", "clsclip_coco20i", "maft_coco171_inductive", "maft_coco171_open_vocabulary"} <= names
    assert {"maft_proposals_coco171", "maft_proposals_voc20", "maft_proposals_world"} <= names


def test_recipes_say_what_was_published() -> None:
    zegclip = load_config("zegclip_voc20_inductive")
    assert (zegclip.iterations, zegclip.batch_size, zegclip.optimizer.lr) == (20_000, 16, 2e-4)
    assert zegclip.model["loss_weights"] == {"mask": 100.0, "dice": 1.0}
    self_training = load_config("tagclip_voc20_transductive")
    assert (self_training.iterations, self_training.model["trusty_token"]) == (10_000, False)
    assert load_config("tagclip_voc20_inductive").checkpoint.export_at == (10_000,)
    region = load_config("clip_rc_coco171_inductive").model
    assert region["num_prompts"] == 100
    assert region["loss_weights"] == {"mask": 200.0, "dice": 3.0, "recovery_q": 50.0, "recovery_k": 50.0}
    assert load_config("clip_rc_voc20_supervised").model["loss_weights"]["recovery_q"] == 0.0
    pairs = load_config("clsclip_coco20i")
    assert (pairs.epochs, pairs.batch_size, pairs.optimizer.lr, pairs.schedule.cycles) == (200, 512, 1e-3, 4)
    maft = load_config("maft_coco171_inductive")
    assert (maft.optimizer.lr, maft.optimizer.clip_norm, maft.optimizer.weight_decay) == (1e-5, 0.01, 1e-4)
    assert (maft.micro_batch, maft.schedule.warmup_iterations, maft.schedule.min_lr) == (2, 0, 0.0)
    shares = {"coco171_inductive": 0.8, "voc20_inductive": 0.7, "ade847_inductive": 2 / 3, "coco171_open_vocabulary": 0}
    for name, share in shares.items():
        model = load_config(f"maft_{name}").model
        assert (model["ensemble"], model["pretrained"]) == (share, "openai")


def test_settings_as_the_papers_print_them() -> None:
    """Where paper and released code part, a setting named after the paper takes its side."""
    for dataset in ("voc20", "coco171"):
        tagclip, published = load_config(f"tagclip_{dataset}_paper"), load_config(f"tagclip_{dataset}_inductive")
        assert (tagclip.model["trusty_init"], tagclip.model["trusty_loss"]) == ("zeros", "dice")
        assert (tagclip.optimizer.no_decay, published.optimizer.no_decay) == ("norms", "none")
        maft, published = load_config(f"maft_{dataset}_paper"), load_config(f"maft_{dataset}_inductive")
        assert maft.model["loss_weights"] == {"ma": 1.0, "dis": 1.0} and maft.optimizer.weight_decay == 1e-5
        assert (maft.model["ensemble_form"], maft.model["iou_range"]) == ("paper", "all")
        assert "proj" not in maft.model["freeze"] and maft.iterations == published.iterations
        assert load_config(f"maft_{dataset}_transductive").setting == "transductive"


def test_overrides_and_base(tmp_path: Path) -> None:
    config = load_config(
        "zegclip_voc20_inductive", ["optimizer.lr=1e-4", "compile=true", "checkpoint.export_at=[5, 7]"]
    )
    assert (config.optimizer.lr, config.compile, config.checkpoint.export_at) == (1e-4, True, (5, 7))
    own = tmp_path / "mine.yaml"
    own.write_text("base: clip_rc_voc20_inductive\nmodel: {regions: 64}\nseed: 5\n")
    config = load_config(own)
    assert (config.model["regions"], config.model["num_prompts"], config.seed) == (64, 10, 5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", "unknown key 'optimiser'; did you mean optimizer\\?"),
        ("optimizer.weight_dekay=1", "unknown key 'optimizer.weight_dekay'; did you mean optimizer.weight_decay"),
        ("iterations=many", "iterations: expected a whole number, got 'many'"),
        ("iterations=0", "iterations: expected at least 1, got 0"),
        ("compile=1", "compile: expected true or false, got 1"),
        ("setting=inductve", "setting: expected one of .* got 'inductve'; did you mean inductive"),
        ("optimizer.betas=[0.9]", "optimizer.betas: expected 2 values"),
        ("epochs=3", "iterations, epochs: expected one of them, got both"),
        ("seed=[", "--set seed: not valid YAML"),
        ("iterations.more=1", "--set: iterations in 'iterations.more' holds a value"),
        ("seed", "--set: expected KEY=VALUE, got 'seed'"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config("zegclip_voc20_inductive", [override])


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="did you mean zegclip_voc20_inductive"):
        load_config("zegclip_voc_inductive")
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ValueError, match="goes round in a circle"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(
        ValueError, match="one of zegclip, tagclip, clip_rc, maft for transductive training, got clsclip"
    ):
        from_dict({"method": "clsclip", "setting": "transductive", "iterations": 1})


def test_every_wrong_key_has_a_line_that_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "under.yaml").write_text("iterations: 5\nbatch_size: 0\noptimizer: {lr: -1.0, eps: yes}\n")
    own = tmp_path / "mine.yaml"
    own.write_text("base: under.yaml\nschedule: {kind: cosine, min_lr: .nan}\nlr: 1\ndata: 5\n")
    with pytest.raises(SettingsError) as caught:
        load_config(own, ["optimizer.betas=[0.9, 1.5]", "text.templates=[1]"])
    under = tmp_path / "under.yaml"
    assert sorted(caught.value.lines) == sorted(
        [
            f"{under}: batch_size: expected at least 1, got 0",
            f"{under}: optimizer.lr: expected at least 0, got -1.0",
            f"{under}: optimizer.eps: expected a number, got True",
            f"{own}: schedule.kind: expected one of poly, cyclic_cosine, got 'cosine'; did you mean cyclic_cosine?",
            f"{own}: schedule.min_lr: expected at least 0, got nan",
            f"{own}: unknown key 'lr'; did you mean optimizer.lr?",
            f"{own}: data: expected keys and values, got 5",
            "--set optimizer.betas[1]: expected below 1, got 1.5",
            "--set text.templates: expected text or a list of text, got [1]",
        ]
    )


def test_files_that_are_no_yaml_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for content, message in (
        (b"iterations: \xff\n", "expected text in UTF-8"),
        (b"a: [1\nb: 2", "not valid YAML at line 2"),
        (b"a: 2024-13-45", "not valid YAML"),
        (b"- 1", "expected keys and values, got list"),
        (b"base: 3", "base: expected a name or a path, got 3"),
        (b"3: 4\niterations: 1", "unknown key '3'"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path}: {message}") as caught:
            load_config(path)
        assert "\n" not in str(caught.value)


def test_settings_cannot_be_changed_into_nonsense() -> None:
    config = load_config("zegclip_voc20_inductive", ["optimizer.lr=1e-3"])
    assert config.optimizer.lr == 1e-3 and isinstance(config.optimizer.lr, float)
    with pytest.raises(ValueError):
        replace(config, batch_size=0)


def test_changed_keys_leave_out_what_is_free() -> None:
    before = load_config("zegclip_voc20_inductive").to_dict()
    after = load_config(
        "zegclip_voc20_inductive", ["output=elsewhere", "data.workers=0", "optimizer.lr=1e-3", "model.num_prompts=12"]
    ).to_dict()
    assert changed_keys(before, after) == ["model.num_prompts: 10 -> 12", "optimizer.lr: 0.0002 -> 0.001"]
