"""Text generation: batches, padding, streams and the ends of texts."""

import pytest
import torch

from gpt_lightning import GPTConfig, GPTModel, generate, generate_simple
from gpt_lightning.generation.engine import stream_ids
from gpt_lightning.generation.sampling import SamplingParams
from gpt_lightning.model.kv_cache import KVCache
from helpers import (
    make_generator,
)


def test_same_seed_gives_same_text_and_seeds_differ(model: GPTModel, idx: torch.Tensor) -> None:
    def drawn(seed: int) -> list[list[int]]:
        ids = generate(model, idx, 20, temperature=1.0, generator=make_generator(seed))
        return ids.tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_generate_keeps_global_generator_and_training_mode(
    model: GPTModel, idx: torch.Tensor
) -> None:
    state = torch.get_rng_state()
    model.train()
    generate(model, idx, 5, temperature=1.0)
    assert model.training
    model.eval()
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_stops_at_eos(model: GPTModel, idx: torch.Tensor) -> None:
    greedy = generate(model, idx[:1], 12)
    eos_id = int(greedy[0, 9])
    first = greedy[0, 5:].tolist().index(eos_id)
    stopped = generate(model, idx[:1], 12, eos_id=eos_id)
    assert stopped.tolist() == greedy[:, : 5 + first].tolist()


def test_rows_end_independently(model: GPTModel, idx: torch.Tensor) -> None:
    greedy = generate(model, idx, 12)
    eos_id = int(greedy[0, 5])
    assert eos_id not in greedy[1, 5:]
    stopped = generate(model, idx, 12, eos_id=eos_id)
    assert stopped[0, 5:].tolist() == [eos_id] * 12
    assert stopped[1].tolist() == greedy[1].tolist()


def test_long_prompt_is_cropped_from_the_left(model: GPTModel) -> None:
    prompt = torch.randint(101, (1, 40), generator=make_generator(4))
    ids = generate(model, prompt, 6)
    assert ids[:, :40].tolist() == prompt.tolist()
    assert ids[:, 40:].tolist() == generate_simple(model, prompt[:, -16:], 6)[:, 16:].tolist()


def stream_table(
    model: GPTModel, prompts: list[list[int]], n: int, **settings: object
) -> list[list[int]]:
    steps = list(stream_ids(model, prompts, n, **{"sampling": SamplingParams(), **settings}))  # type: ignore[arg-type]
    return torch.stack(steps, dim=1).tolist()


@pytest.mark.parametrize("token", [-1, 101])
def test_prompt_ids_outside_the_vocabulary_are_refused(model: GPTModel, token: int) -> None:
    with pytest.raises(ValueError, match="do not fit the model's vocabulary of 101"):
        stream_table(model, [[1, token]], 1)


def test_padding_changes_no_logit(model: GPTModel) -> None:
    long, short = (
        torch.randint(101, (1, 12), generator=make_generator(1)),
        torch.tensor([[3, 1, 4]]),
    )
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), short], dim=1)
    both = torch.cat([long, padded])
    padding = torch.tensor([0, 9])
    logits = model.head(model.features(both, padding=padding))
    torch.testing.assert_close(logits[0], model(long)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[1, 9:], model(short)[0], rtol=1e-5, atol=1e-5)

    cache = KVCache.allocate(model.config, 2, 16)
    model.features(both, cache, padding)
    after = model.head(model.features(torch.tensor([[2], [2]]), cache, padding))
    alone = model(torch.cat([short, torch.tensor([[2]])], dim=1))
    torch.testing.assert_close(after[1, 0], alone[0, -1], rtol=1e-5, atol=1e-5)


PROMPTS = [
    [5],
    [7, 8, 9, 10, 11],
    list(range(40, 53)),
    list(range(20, 60)),
]  # 40 > the context of 16


@pytest.mark.parametrize("num_samples", [1, 3])
def test_batched_rows_equal_single_prompts(model: GPTModel, num_samples: int) -> None:
    """Prompts of 1, 5, 13 and 40 tokens in one batch, generated beyond the context of 16."""
    together = stream_table(model, PROMPTS, 25, num_samples=num_samples)
    assert len(together) == 4 * num_samples
    for i, prompt in enumerate(PROMPTS):
        expected = generate_simple(model, torch.tensor([prompt]), 25)[0, len(prompt) :].tolist()
        for sample_row in together[i * num_samples : (i + 1) * num_samples]:
            assert sample_row == expected


def test_long_prompts_and_texts_past_1024_positions() -> None:
    """Prompts of 1, 5, 200, 1,023 and 1,500 tokens: batched = single = the loop without a cache."""
    torch.manual_seed(3)
    config = GPTConfig(vocab_size=101, context_length=1024, emb_dim=16, n_heads=2, n_layers=2)
    long_model = GPTModel(config).eval()
    prompts = [
        torch.randint(101, (n,), generator=make_generator(n)).tolist()
        for n in (1, 5, 200, 1023, 1500)
    ]
    together = stream_table(long_model, prompts, 6)
    for row, prompt in zip(together, prompts, strict=True):
        expected = generate_simple(long_model, torch.tensor([prompt]), 6)[0, len(prompt) :].tolist()
        assert row == expected
        assert stream_table(long_model, [prompt], 6) == [expected]


def test_samples_of_a_prompt_differ_and_repeat_with_the_seed(model: GPTModel) -> None:
    def drawn() -> list[list[int]]:
        return stream_table(
            model,
            PROMPTS[:2],
            12,
            sampling=SamplingParams(1.0),
            num_samples=4,
            generator=make_generator(3),
        )

    rows = drawn()
    assert rows == drawn()
    assert len({tuple(row) for row in rows}) == 8


def test_rows_that_ended_yield_no_tokens(model: GPTModel) -> None:
    free = stream_table(model, PROMPTS, 10)
    eos_id = free[1][3]
    stopped = stream_table(model, PROMPTS, 10, eos_id=eos_id)
    for row, expected in zip(stopped, free, strict=True):
        end = expected.index(eos_id) if eos_id in expected else 10
        assert row == expected[:end] + [-1] * (len(row) - end)


def test_error_of_a_model_with_nan_weights_names_the_token(model: GPTModel) -> None:
    torch.manual_seed(0)
    broken_model = GPTModel(model.config)
    with torch.no_grad():
        broken_model.final_norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"logits: .*\(new token 0\)"):
        stream_table(broken_model, PROMPTS[:1], 3)


def test_exercise_5_3(model: GPTModel, idx: torch.Tensor) -> None:
    """Deterministic decoding: temperature 0 with any seed = the plain loop = top_k 1 at temperature 1."""
    expected = generate_simple(model, idx, 30)  # past the context of 16
    for seed in (1, 2, 3):
        assert torch.equal(generate(model, idx, 30, generator=make_generator(seed)), expected)
        drawn = generate(model, idx, 30, temperature=1.0, top_k=1, generator=make_generator(seed))
        assert torch.equal(drawn, expected)
