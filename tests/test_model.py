"""WorldModel as people hold it: saved and loaded, one checkpoint for every chunk length, and clear errors."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file, save_file
from tiny import SIZES, dreamt, tiny_model
from toys import box_spec

from world_model.contract import Dynamics, Spec
from world_model.files import save_atomically, write_atomically
from world_model.model.config import WorldModelConfig
from world_model.model.world_model import StartStates, WorldModel
from world_model.state import LatentState


def begun(model: WorldModel, batch: int = 2, frames: int = 3) -> LatentState:
    g = torch.Generator().manual_seed(0)
    return model.observe(
        model.initial(batch, torch.arange(batch)),
        torch.randn(batch, frames, 3, generator=g),
        torch.zeros(batch, frames, 2),
    )


# -- what one checkpoint serves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [True, False])
def test_every_chunk_length_up_to_its_own(draft: bool) -> None:
    model = tiny_model("SDG", chunk=4, draft=draft)
    state = begun(model)
    for k in range(1, 5):
        actions = torch.linspace(-2, 2, 2 * k * 2).view(2, k, 2)
        whole, imagined = model.imagine(state, actions)
        assert imagined.obs is not None and imagined.obs.shape == (2, k, 3)
        assert imagined.reward.shape == imagined.terminated.shape == (2, k) and imagined.terminated.dtype == torch.bool
        single = state
        for action in actions.split(1, 1):
            single, _ = model.imagine(single, action)
        assert {name: (t.shape, t.dtype) for name, t in whole.tensors.items()} == {
            name: (t.shape, t.dtype) for name, t in single.tensors.items()
        }
        assert torch.equal(whole["age"], single["age"]) and whole["age"].tolist() == [3 + k] * 2
        assert torch.equal(whole["seed"], state["seed"])


def test_no_dream_ends_where_no_episode_ever_did() -> None:
    model = tiny_model()
    state, actions = begun(model, batch=64), torch.zeros(64, 4, 2)
    model.memory_reward_head.bias[1] += 50
    assert model.imagine(state, actions)[1].terminated.all()
    model.terminates.fill_(False)
    assert not model.imagine(state, actions)[1].terminated.any()


def test_offers_the_verbs_in_the_simulators_units() -> None:
    model: Dynamics = tiny_model()
    state = model.observe(model.initial(2), torch.zeros(2, 1, 3, dtype=torch.float64))  # float64 evidence is welcome
    _, imagined = model.imagine(state, torch.zeros(2, 1, 2, dtype=torch.float64))
    assert imagined.obs is not None and imagined.obs.dtype == imagined.reward.dtype == torch.float32


# -- checkpoints -------------------------------------------------------------------------------------------------------


def saved(folder: Path, draft: bool = True) -> WorldModel:
    model = tiny_model("SDG", draft=draft)
    model.card = {"env": "Toy-v0", "command": "kairos train"}
    model.starts = StartStates(torch.randn(5, 2, 3), torch.randn(5, 2, 2))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("draft", [True, False])
def test_round_trip_gives_identical_dreams(tmp_path: Path, draft: bool) -> None:
    model = saved(tmp_path, draft=draft)
    loaded = WorldModel.from_pretrained(str(tmp_path))
    assert loaded.config == model.config and loaded.spec == model.spec and loaded.card == model.card
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.starts is not None and model.starts is not None
    assert all(torch.equal(a, b) for a, b in zip(loaded.starts, model.starts, strict=True))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    actions = torch.linspace(-2, 2, 16).view(2, 4, 2)
    for sampled in (False, True):
        (state, one), (other, two) = (
            m.imagine(begun(m), actions, sampled=sampled, flow_steps=3) for m in (model, loaded)
        )
        assert state.to_bytes() == other.to_bytes()
        assert torch.equal(dreamt(one), dreamt(two))
        assert torch.equal(one.reward, two.reward) and torch.equal(one.terminated, two.terminated)


def test_a_checkpoint_is_json_and_safetensors_alone(tmp_path: Path) -> None:
    saved(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "card.json",
        "config.json",
        "model.safetensors",
        "starts.safetensors",
    ]
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text())
    for path in tmp_path.glob("*.safetensors"):
        load_file(path)


def test_fingerprint_tells_weights_apart() -> None:
    model, same, other = tiny_model(), tiny_model(), tiny_model()
    next(other.trunk.parameters()).view(-1)[0] += 1e-3
    assert model.fingerprint() == same.fingerprint() != other.fingerprint()


def cut(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return damage


def rewrite(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        about = json.loads((folder / "config.json").read_text())
        change(about)
        (folder / "config.json").write_text(json.dumps(about))

    return damage


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["tokens.out.weight"]
    save_file(weights, folder / "model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "model.safetensors"),
    "weights cut short": (cut("model.safetensors"), ValueError, "damaged"),
    "config cut short": (cut("config.json"), ValueError, "damaged"),
    "starts cut short": (cut("starts.safetensors"), ValueError, "damaged"),
    "card cut short": (cut("card.json"), ValueError, "damaged"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ValueError, "damaged"),
    "no spec": (rewrite(lambda about: about.pop("spec")), ValueError, "spec"),
    "unknown key": (rewrite(lambda about: about["world_model"].update(rotary=True)), ValueError, "rotary"),
    "unknown letter": (rewrite(lambda about: about["world_model"].update(pattern="SXG")), ValueError, "'X'"),
    "other width": (rewrite(lambda about: about["world_model"].update(width=16)), ValueError, "size mismatch"),
    "other layers": (rewrite(lambda about: about["world_model"].update(pattern="SDGG")), ValueError, "Missing key"),
    "other observations": (rewrite(lambda about: about["world_model"].update(obs_dim=4)), ValueError, "obs_dim"),
    "a weight is gone": (drop_a_weight, ValueError, r"tokens\.out\.weight"),
    "starts of another model": (
        lambda f: save_file({"obs": torch.zeros(5, 2, 7), "actions": torch.zeros(5, 2, 2)}, f / "starts.safetensors"),
        ValueError,
        "starts",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    saved(tmp_path)
    spoil, error, says = DAMAGE[damage]
    spoil(tmp_path)
    with pytest.raises(error, match=says) as raised:
        WorldModel.from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value), "the error doesn't say which folder"


def test_no_such_model() -> None:
    with pytest.raises(FileNotFoundError, match=r"/no/such/folder.*neither a folder.* nor a hub repository"):
        WorldModel.from_pretrained("/no/such/folder")


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def disk_full(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError("No space left on device")

    weights, text = tmp_path / "model.safetensors", tmp_path / "config.json"
    save_atomically(weights, {"x": torch.ones(3)})
    write_atomically(text, b"whole")
    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_atomically(weights, {"x": torch.zeros(3)})
    with pytest.raises(OSError, match="No space"):
        write_atomically(text, b"new")
    assert torch.equal(load_file(weights)["x"], torch.ones(3))
    assert text.read_bytes() == b"whole"


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["SXG", "", "sg"])
def test_unknown_layer_letter(pattern: str) -> None:
    with pytest.raises(ValueError, match=rf"{pattern!r}.*known are S \(sliding window\), D .*, G \(gated delta rule\)"):
        WorldModelConfig(3, 2, pattern=pattern)


@pytest.mark.parametrize(
    ("name", "value"),
    [("obs_dim", 0), ("tokens", 0), ("window", -1), ("width", 8.0), ("heads", True), ("chunk", "4"), ("head_dim", 1)],
)
def test_bad_sizes(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*{value!r}"):
        WorldModelConfig.from_dict({"obs_dim": 3, "action_dim": 2, name: value})


@pytest.mark.parametrize(("name", "sizes"), [("obs_dim", (4, 2, 4)), ("action_dim", (3, 1, 4)), ("chunk", (3, 2, 8))])
def test_config_and_spec_must_agree(name: str, sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=f"config.{name}="):
        WorldModel(WorldModelConfig(3, 2, chunk=4, **SIZES), box_spec(*sizes[:2], chunk=sizes[2]))


def test_actions_need_bounds() -> None:
    box = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    with pytest.raises(ValueError, match="finite bounds"):
        WorldModel(WorldModelConfig(2, 2, chunk=4, **SIZES), Spec(box, box, 4, 1.0))


@pytest.mark.parametrize(
    "obs",
    [
        torch.zeros(2, 3),
        torch.zeros(3, 1, 3),
        torch.zeros(2, 1, 4),
        torch.zeros(2, 0, 3),
        torch.zeros(2, 1, 3, dtype=torch.int64),
        np.zeros((2, 1, 3)),
    ],
    ids=["no T", "other batch", "other O", "T=0", "int64", "numpy"],
)
def test_observe_wants_obs_of_its_shape(obs: torch.Tensor) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"obs must be a float tensor of shape \(2, T, 3\), got"):
        model.observe(model.initial(2), obs)


def test_observe_wants_the_actions_that_led_there() -> None:
    model = tiny_model()
    fresh, seen = model.initial(2), begun(model)
    for state, obs in ((fresh, torch.zeros(2, 2, 3)), (seen, torch.zeros(2, 1, 3))):
        with pytest.raises(ValueError, match="needs the actions that led"):
            model.observe(state, obs)
    with pytest.raises(ValueError, match=r"actions must be a float tensor of shape \(2, 4, 2\), got \(2, 3, 2\)"):
        model.observe(fresh, torch.zeros(2, 4, 3), torch.zeros(2, 3, 2))


@pytest.mark.parametrize(
    "actions",
    [torch.zeros(2, 2), torch.zeros(1, 4, 2), torch.zeros(2, 4, 3), torch.zeros(2, 4, 2, dtype=torch.int64)],
    ids=str,
)
def test_imagine_wants_actions_of_its_shape(actions: torch.Tensor) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"actions must be a float tensor of shape \(2, T, 2\), got"):
        model.imagine(begun(model), actions)


def test_imagine_wants_a_chunk_it_was_trained_for() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="1 to 4 actions for this model, got 5"):
        model.imagine(begun(model), torch.zeros(2, 5, 2))
    with pytest.raises(ValueError, match="flow_steps must be at least 1, got 0"):
        model.imagine(begun(model), torch.zeros(2, 1, 2), flow_steps=0)


def test_imagine_wants_dreams_that_have_seen_something() -> None:
    model = tiny_model()
    state = begun(model)
    half = LatentState({name: torch.cat([t[:1], model.initial(1)[name]]) for name, t in state.tensors.items()})
    for blind in (model.initial(2), half):
        with pytest.raises(ValueError, match="call observe first"):
            model.imagine(blind, torch.zeros(2, 1, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_evidence_and_actions_must_be_finite(value: float) -> None:
    model = tiny_model()
    obs, actions = torch.zeros(2, 3, 3), torch.zeros(2, 3, 2)
    state = begun(model)
    bad_obs, bad_actions = obs.clone(), actions.clone()
    bad_obs[1, 2, 0] = bad_actions[1, 2, 0] = value
    with pytest.raises(ValueError, match=r"obs.*finite"):
        model.observe(state, bad_obs, actions)
    with pytest.raises(ValueError, match=r"actions.*finite"):
        model.observe(state, obs, bad_actions)
    with pytest.raises(ValueError, match=r"actions.*finite"):
        model.imagine(state, bad_actions)


def test_initial_wants_a_batch_and_a_seed_for_each() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        model.initial(0)
    for seeds in (torch.zeros(3, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0.5, 1.5])):
        with pytest.raises(ValueError, match=r"seeds must be int64 of shape \(2,\)"):
            model.initial(2, seeds)
