import pytest
import torch

from gpt_lightning import GPTConfig, GPTModel, generate, generate_simple
from gpt_lightning.generation.sampling import keep_top_k, probabilities, sample

CONFIG = GPTConfig(vocab_size=101, context_length=16, emb_dim=32, n_heads=4, n_layers=2)


@pytest.fixture(scope="module")
def model() -> GPTModel:
    torch.manual_seed(1)
    return GPTModel(CONFIG).eval()


@pytest.fixture
def idx() -> torch.Tensor:
    return torch.randint(101, (2, 5), generator=torch.Generator().manual_seed(2))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_exercise_5_3(model: GPTModel, idx: torch.Tensor) -> None:
    """Deterministic decoding: temperature 0 with any seed = the plain loop = top_k 1 at temperature 1."""
    expected = generate_simple(model, idx, 30)  # past the context of 16
    for seed in (1, 2, 3):
        assert torch.equal(generate(model, idx, 30, generator=seeded(seed)), expected)
        drawn = generate(model, idx, 30, temperature=1.0, top_k=1, generator=seeded(seed))
        assert torch.equal(drawn, expected)


def test_a_seed_gives_one_text_and_seeds_differ(model: GPTModel, idx: torch.Tensor) -> None:
    def drawn(seed: int) -> list[list[int]]:
        ids = generate(model, idx, 20, temperature=1.0, generator=seeded(seed))
        return ids.tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_global_generator_and_mode_are_left_alone(model: GPTModel, idx: torch.Tensor) -> None:
    state = torch.get_rng_state()
    model.train()
    generate(model, idx, 5, temperature=1.0)
    assert model.training
    model.eval()
    assert torch.equal(torch.get_rng_state(), state)


def test_stops_at_eos(model: GPTModel, idx: torch.Tensor) -> None:
    greedy = generate(model, idx[:1], 12)
    eos_id = int(greedy[0, 9])
    first = greedy[0, 5:].tolist().index(eos_id)
    stopped = generate(model, idx[:1], 12, eos_id=eos_id)
    assert stopped.tolist() == greedy[:, : 5 + first].tolist()


def test_rows_end_on_their_own(model: GPTModel, idx: torch.Tensor) -> None:
    greedy = generate(model, idx, 12)
    eos_id = int(greedy[0, 5])
    assert eos_id not in greedy[1, 5:]
    stopped = generate(model, idx, 12, eos_id=eos_id)
    assert stopped[0, 5:].tolist() == [eos_id] * 12
    assert stopped[1].tolist() == greedy[1].tolist()


def test_long_prompt_is_cropped_from_the_left(model: GPTModel) -> None:
    prompt = torch.randint(101, (1, 40), generator=seeded(4))
    ids = generate(model, prompt, 6)
    assert ids[:, :40].tolist() == prompt.tolist()
    assert ids[:, 40:].tolist() == generate_simple(model, prompt[:, -16:], 6)[:, 16:].tolist()


def test_top_k_keeps_exactly_k_and_the_lower_ids_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    for k in range(1, 6):
        assert torch.isfinite(keep_top_k(logits, k)).sum(dim=-1).tolist() == [k, k]
    assert torch.isfinite(keep_top_k(logits, 2)).nonzero()[:, 1].tolist() == [1, 2, 0, 1]


def test_top_k_1_agrees_with_greedy_on_ties() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0]]).repeat(50, 1)
    drawn = sample(logits, temperature=1.0, top_k=1, generator=seeded(0))
    assert drawn.tolist() == sample(logits).tolist() == [1] * 50


@pytest.mark.parametrize("temperature", [1e-40, 1e-8, 1.0, 1e6])
def test_probabilities_are_finite_at_any_temperature(temperature: float) -> None:
    p = probabilities(torch.tensor([[80.0, -80.0, 79.0]]), temperature)
    assert torch.isfinite(p).all()
    assert p.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_k": 0}, "top_k: 0"),
        ({"top_k": 102}, "top_k: 102 is outside the vocabulary; give 1 to 101"),
    ],
)
def test_impossible_settings_are_refused(
    model: GPTModel, idx: torch.Tensor, settings: dict[str, float], what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        generate(model, idx, 3, **settings)  # type: ignore[arg-type]
