import json
import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from trl_ext.errors import ConfigError, DataError
from trl_ext.oracle.tokenizer import tabular_tokenizer
from trl_ext.poe import corpus as corpus_module
from trl_ext.poe import counted_base
from trl_ext.poe.counted import CountedExpert, NaiveBayesExpert, NGramExpert

V = 5
# n_0 = 2, n_1 = 4, n_2 = 1; n = 7.
# One place before: n_{0,1} = 2, n_{1,0} = n_{1,1} = n_{1,2} = 1. Two places: n²_{0,0} = n²_{1,1} =
# n²_{0,2} = 1.
HAND = [[0, 1, 0, 1, 2], [1, 1]]

corpora = st.lists(st.lists(st.integers(0, V - 1), max_size=8), min_size=1, max_size=6).filter(any)
pseudo_counts = st.sampled_from([1e-10, 0.1, 1.0, 7.5])


def quietly(cls, sequences, **arguments):
    return cls.fit(sequences, **{"vocab_size": V, "progress": False} | arguments)


def experts(sequences, pseudo_count):
    for window in (1, 2, 4):
        yield quietly(NaiveBayesExpert, sequences, window=window, pseudo_count=pseudo_count)
    for order in (1, 2, 3, 5):
        yield quietly(NGramExpert, sequences, order=order, pseudo_count=pseudo_count)


def any_experts():
    generator = np.random.default_rng(0)
    lengths = (9, 1, 0, 30, 4)
    return list(experts([generator.integers(V, size=length) for length in lengths], 0.5))


def probabilities(expert, prefix):
    """P(.|prefix), prefix as a list."""
    return expert.next_log_probs(torch.tensor([prefix], dtype=torch.long))[0].exp().tolist()


def slow_naive_bayes(sequences, window, a, prefix):
    """The definition, one token and one feature at a time."""
    n_c = Counter(token for sequence in sequences for token in sequence)
    n = sum(n_c.values())
    joint = []
    for c in range(V):
        value = (n_c[c] + a) / (n + a * V)
        for j in range(1, min(window, len(prefix)) + 1):
            seen = sum(
                sequence[t] == c and sequence[t - j] == prefix[-j]
                for sequence in sequences
                for t in range(j, len(sequence))
            )
            value *= (seen + a) / (n_c[c] + a * V)
        joint.append(value)
    return [value / sum(joint) for value in joint]


def slow_ngram(sequences, order, a, prefix):
    """The definition: what followed the last tokens, wherever they are in the corpus."""
    context = prefix[len(prefix) - min(order - 1, len(prefix)) :]
    followers = Counter(
        sequence[t]
        for sequence in sequences
        for t in range(len(context), len(sequence))
        if sequence[t - len(context) : t] == context
    )
    return [(followers[c] + a) / (followers.total() + a * V) for c in range(V)]


def slowly(expert, sequences, prefix):
    if isinstance(expert, NaiveBayesExpert):
        return slow_naive_bayes(sequences, expert.window, expert.pseudo_count, prefix)
    return slow_ngram(sequences, expert.order, expert.pseudo_count, prefix)


@pytest.mark.equation("E13")
def test_naive_bayes_by_hand():
    expert = quietly(NaiveBayesExpert, HAND, vocab_size=3)
    # P(c) = (2 + 1)/(7 + 3), (4 + 1)/10, (1 + 1)/10.
    assert probabilities(expert, []) == pytest.approx([0.3, 0.5, 0.2])
    # P(1|c) = (1 + 1)/(2 + 3), (1 + 1)/(4 + 3), (1 + 1)/(1 + 3). P(c)·P(1|c) = 6/50, 1/7, 1/10,
    # that is 42, 50 and 35 of 350.
    assert probabilities(expert, [1]) == pytest.approx([42 / 127, 50 / 127, 35 / 127])
    # P(0|c) = 1/5, 3/7, 1/4: P(c)·P(0|c) = 3/50, 3/14, 1/20, that is 42, 150, 35 of 700. What was
    # before the window changes nothing.
    assert probabilities(expert, [2, 0]) == pytest.approx([42 / 227, 150 / 227, 35 / 227])


@pytest.mark.equation("E13")
def test_naive_bayes_has_a_table_for_each_distance():
    expert = quietly(NaiveBayesExpert, HAND, vocab_size=3, window=2)
    # Behind 1, 0: P_1(0|c) = 1/5, 3/7, 1/4 as above; P_2(1|c) = (0 + 1)/5, (1 + 1)/7, (0 + 1)/4.
    joint = [0.3 / 5 / 5, 0.5 * 3 / 7 * 2 / 7, 0.2 / 4 / 4]
    assert probabilities(expert, [1, 0]) == pytest.approx([p / sum(joint) for p in joint])
    # With one token before it there is one feature: as in window 1.
    assert probabilities(expert, [1]) == pytest.approx([42 / 127, 50 / 127, 35 / 127])


@pytest.mark.equation("E13")
def test_ngrams_by_hand():
    trigrams = quietly(NGramExpert, HAND, vocab_size=3, order=3)
    assert probabilities(trigrams, []) == pytest.approx([0.3, 0.5, 0.2])
    # One token before it: the bigrams. 1 was followed by 0, 1 and 2: (1 + 1)/(3 + 3) each.
    assert probabilities(trigrams, [1]) == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    # 0 was followed by 1 twice: (0 + 1)/(2 + 3), (2 + 1)/5.
    assert probabilities(trigrams, [0]) == pytest.approx([0.2, 0.6, 0.2])
    # 0, 1 was followed by 0 and by 2: (1 + 1)/(2 + 3), (0 + 1)/5, (1 + 1)/5. 1, 1 by nothing.
    assert probabilities(trigrams, [2, 0, 1]) == pytest.approx([0.4, 0.2, 0.4])
    assert probabilities(trigrams, [1, 1]) == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    unigrams = quietly(NGramExpert, HAND, vocab_size=3, order=1)
    assert probabilities(unigrams, [1, 0]) == pytest.approx([0.3, 0.5, 0.2])


def test_what_it_says_of_itself():
    expert = quietly(NGramExpert, HAND, vocab_size=3, order=3, pseudo_count=1)
    assert (expert.num_tokens, expert.vocab_size, expert.order) == (7, 3, 3)
    assert (expert.context_length, expert.tokenizer, expert.device.type) == (2, None, "cpu")
    # −Σ P log P of 0.3, 0.5, 0.2.
    expected = -(0.3 * math.log(0.3) + 0.5 * math.log(0.5) + 0.2 * math.log(0.2))
    assert expert.prior_entropy == pytest.approx(expected, rel=1e-12)
    assert repr(expert) == "NGramExpert(order=3, pseudo_count=1, vocab_size=3, num_tokens=7)"
    bayes = quietly(NaiveBayesExpert, HAND, vocab_size=3, window=4)
    assert (bayes.window, bayes.context_length) == (4, 4)


@pytest.mark.equation("E13")
@pytest.mark.parametrize("cls", [NaiveBayesExpert, NGramExpert])
def test_without_smoothing_one_token_of_context_is_the_bigram_model(cls):
    expert = quietly(cls, HAND, vocab_size=3, pseudo_count=1e-10)
    # n_{f,c}/n_f: 0 is followed by 1; 1 by each of the three, once. (2 is followed by nothing.)
    assert probabilities(expert, [0]) == pytest.approx([0, 1, 0], abs=1e-6)
    assert probabilities(expert, [1]) == pytest.approx([1 / 3] * 3, rel=1e-6)


@given(corpora)
def test_without_smoothing_naive_bayes_of_window_1_is_the_bigram_model(sequences):
    bayes = quietly(NaiveBayesExpert, sequences, pseudo_count=1e-10)
    bigrams = quietly(NGramExpert, sequences, order=2, pseudo_count=1e-10)
    contexts = {token for sequence in sequences for token in sequence[:-1]}
    for context in contexts:
        torch.testing.assert_close(
            bayes.next_log_probs(torch.tensor([[context]])).exp(),
            bigrams.next_log_probs(torch.tensor([[context]])).exp(),
            atol=1e-6,
            rtol=1e-6,
        )


@settings(max_examples=40)
@given(corpora, pseudo_counts, st.lists(st.integers(0, V - 1), min_size=1, max_size=6))
def test_look_up_equals_the_definition(sequences, pseudo_count, row):
    ids = torch.tensor([row, row[::-1]])
    for expert in experts(sequences, pseudo_count):
        log_probs = expert.log_probs(ids)
        assert log_probs.dtype == torch.float32
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(ids.shape))
        expected = torch.tensor(
            [
                [slowly(expert, sequences, tokens[: t + 1]) for t in range(len(tokens))]
                for tokens in ids.tolist()
            ],
            dtype=torch.float64,
        ).log()
        torch.testing.assert_close(log_probs, expected.float(), rtol=1e-5, atol=1e-5)
        assert probabilities(expert, []) == pytest.approx(slowly(expert, sequences, []), abs=1e-6)


def padded(row, left, right):
    """Ids and mask of a row with tokens that must not be read on both sides."""
    ids = torch.tensor([[3] * left + row + [999] * right])
    mask = torch.tensor([[0] * left + [1] * len(row) + [0] * right])
    return ids, mask


@pytest.mark.parametrize("expert", any_experts(), ids=repr)
def test_padding_equals_slicing(expert):
    row = [0, 4, 4, 1, 2, 0]
    ids = torch.tensor([row])
    for left, right in [(3, 0), (0, 3), (2, 1)]:
        padded_ids, mask = padded(row, left, right)
        kept = slice(left, left + len(row))
        for given_mask in (mask, mask.bool()):
            log_probs = expert.log_probs(padded_ids, given_mask)
            assert torch.equal(log_probs[:, kept], expert.log_probs(ids))
        # Rows of padding are the beginning of a sequence.
        prior = expert.next_log_probs(ids[:, :0])
        outside = torch.cat([log_probs[0, :left], log_probs[0, kept.stop :]])
        assert torch.equal(outside, prior.expand_as(outside))
        assert torch.equal(expert.next_log_probs(padded_ids, mask), expert.next_log_probs(ids))
        token_log_probs = expert.token_log_probs(padded_ids, mask)
        torch.testing.assert_close(token_log_probs[:, kept], expert.token_log_probs(ids))
        assert token_log_probs[mask == 0].tolist() == [0.0] * (left + right)


@pytest.mark.parametrize("expert", any_experts(), ids=repr)
def test_rows_of_one_batch_do_not_mix(expert):
    ids = torch.tensor([[0, 1, 2, 3], [7, 7, 4, 0], [8, 8, 8, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])
    rows = [ids[:1], ids[1:2, 2:], ids[2:, :0]]
    alone = torch.cat([expert.next_log_probs(row) for row in rows])
    assert torch.equal(expert.next_log_probs(ids, mask), alone)
    assert torch.equal(expert.log_probs(ids, mask)[:, -1], alone)


@pytest.mark.parametrize("expert", any_experts(), ids=repr)
def test_a_masked_token_in_between_ends_the_context(expert):
    ids = torch.tensor([[0, 1, 9, 4, 2]])
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    behind = expert.log_probs(torch.tensor([[4, 2]]))
    assert torch.equal(expert.log_probs(ids, mask)[:, 3:], behind)


@pytest.mark.parametrize("expert", any_experts(), ids=repr)
def test_the_last_tokens_are_enough_for_the_next(expert):
    ids = torch.randint(V, (3, 12))
    last = ids[:, 12 - expert.context_length :]
    assert torch.equal(expert.next_log_probs(ids), expert.log_probs(ids)[:, -1])
    assert torch.equal(expert.next_log_probs(ids), expert.next_log_probs(last))


@pytest.mark.parametrize("expert", any_experts(), ids=repr)
def test_token_log_probs_are_those_of_the_rows_before(expert):
    ids = torch.randint(V, (3, 12))
    prior = expert.next_log_probs(ids[:, :0])[:, None]
    rows = torch.cat([prior, expert.log_probs(ids)[:, :-1]], dim=1)
    token_log_probs = expert.token_log_probs(ids)
    assert token_log_probs.dtype == torch.float32
    torch.testing.assert_close(token_log_probs, rows.gather(-1, ids[..., None])[..., 0])


@pytest.mark.equation("E13")
@pytest.mark.parametrize("expert", any_experts(), ids=repr)
def test_sequences_of_one_length_have_probability_one_together(expert):
    ids = torch.tensor(list(product(range(V), repeat=4)))
    assert expert.token_log_probs(ids).sum(-1).exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("expert", any_experts(), ids=repr)
def test_an_empty_batch_has_empty_scores(expert, shape):
    ids = torch.zeros(shape, dtype=torch.int32)
    assert expert.log_probs(ids).shape == (*shape, V)
    assert expert.token_log_probs(ids).shape == shape
    assert expert.next_log_probs(ids).shape == (shape[0], V)


@pytest.mark.parametrize("expert", any_experts(), ids=repr)
def test_chunks_of_scores_change_nothing(expert, monkeypatch):
    ids = torch.randint(V, (3, 7))
    whole = expert.log_probs(ids), expert.token_log_probs(ids)
    monkeypatch.setattr(counted_base, "SCORES_AT_ONCE", 2 * V)
    assert torch.equal(expert.log_probs(ids), whole[0])
    assert torch.equal(expert.token_log_probs(ids), whole[1])


def test_ngrams_score_tokens_without_the_vocabulary():
    # (B, T, V) would be 32 GB.
    expert = quietly(NGramExpert, HAND, vocab_size=1_000_000)
    ids = torch.randint(3, (8, 1000))
    assert expert.token_log_probs(ids).shape == (8, 1000)


def test_a_tiny_pseudo_count_and_a_long_window_do_not_underflow():
    # Π_j P_j is about 1e-300 to the power of 8 for what was not seen: 0 even in float64.
    expert = quietly(NaiveBayesExpert, HAND, vocab_size=3, window=8, pseudo_count=1e-300)
    log_probs = expert.next_log_probs(torch.tensor([[2] * 8]))
    assert log_probs.isfinite().all()
    # (n_c/n)·(a/n_c)^8: the rarest token, 2, has 2^7 times more than the next and nearly all.
    assert log_probs.exp()[0, 2].item() == pytest.approx(1 / (1 + 2**-7 + 4**-7))


@settings(max_examples=40)
@given(corpora, st.integers(1, 9))
def test_chunked_counting_equals_counting_at_once(sequences, size):
    whole = list(experts(sequences, 1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "TOKENS_AT_ONCE", size)
        patch.setattr(corpus_module, "SEQUENCES_AT_ONCE", size)
        chunked = list(experts(sequences, 1.0))
    for one, other in zip(whole, chunked, strict=True):
        assert_equal(one, other)


def assert_equal(one, other):
    """Equal counts, and all that is looked up in them."""
    assert repr(one) == repr(other)
    assert torch.equal(one._counts.tokens, other._counts.tokens)
    for table, other_table in zip(one._counts.tables, other._counts.tables, strict=True):
        assert torch.equal(table.pairs, other_table.pairs)
        assert torch.equal(table.counts, other_table.counts)
        if table.row_keys is not None:
            assert torch.equal(table.row_keys, other_table.row_keys)
    ids = torch.randint(one.vocab_size, (2, 8))
    assert torch.equal(one.log_probs(ids), other.log_probs(ids))
    assert one.prior_entropy == other.prior_entropy


@pytest.mark.parametrize(
    "given",
    [
        [tuple(sequence) for sequence in HAND],
        [np.array(sequence, dtype=np.uint16) for sequence in HAND],
        [torch.tensor(sequence, dtype=torch.int32) for sequence in HAND],
        [[], *HAND, []],
        Dataset.from_dict({"input_ids": HAND, "label": [0, 1]}),
        Dataset.from_dict({"input_ids": HAND}).with_format("torch"),
        Dataset.from_dict({"input_ids": HAND, "label": [0, 1]}).to_iterable_dataset(),
        IterableDataset.from_generator(lambda: ({"input_ids": ids} for ids in HAND)),
        [{"input_ids": sequence} for sequence in HAND],
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_holds_the_sequences(given):
    assert_equal(
        quietly(NGramExpert, given, vocab_size=3), quietly(NGramExpert, HAND, vocab_size=3)
    )


def test_a_generator_and_a_2d_tensor_are_sequences():
    rows = torch.tensor([[0, 1, 2], [2, 2, 1]])
    expected = quietly(NaiveBayesExpert, rows.tolist(), window=2)
    assert_equal(quietly(NaiveBayesExpert, rows, window=2), expected)
    assert_equal(quietly(NaiveBayesExpert, (row for row in rows), window=2), expected)


def test_texts_are_tokenised_and_ended():
    tokenizer = tabular_tokenizer(4)  # <eos> 0, a 1, b 2, c 3
    texts = ["ab", "", "c"]
    without = NGramExpert.fit(texts, tokenizer=tokenizer, progress=False)
    assert without.tokenizer is tokenizer
    assert without.vocab_size == 4
    assert_equal(without, quietly(NGramExpert, [[1, 2], [3]], vocab_size=4))
    dataset = Dataset.from_dict({"text": texts, "input_ids": [[0], [0], [0]]})
    ended = NGramExpert.fit(
        dataset, tokenizer=tokenizer, column="text", add_eos=True, progress=False
    )
    assert_equal(ended, quietly(NGramExpert, [[1, 2, 0], [0], [3, 0]], vocab_size=4))


def test_no_special_tokens_are_counted():
    tokenizer = tabular_tokenizer(4)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)]
    )
    assert tokenizer("ab")["input_ids"] == [0, 1, 2]
    expert = NGramExpert.fit(["ab"], tokenizer=tokenizer, progress=False)
    assert_equal(expert, quietly(NGramExpert, [[1, 2]], vocab_size=4))


def test_texts_and_token_ids_may_be_mixed():
    tokenizer = tabular_tokenizer(4)
    expert = NGramExpert.fit([[1], "b", [3], "ab"], tokenizer=tokenizer, progress=False)
    assert_equal(expert, quietly(NGramExpert, [[1], [2], [3], [1, 2]], vocab_size=4))


def test_the_progress_bar_knows_the_total_and_can_be_silent(capsys):
    quietly(NaiveBayesExpert, HAND)
    assert capsys.readouterr() == ("", "")
    quietly(NaiveBayesExpert, HAND, progress=True)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize("expert", any_experts(), ids=repr)
def test_saved_and_loaded_it_is_the_same(expert, tmp_path):
    expert.save(tmp_path / "new" / "folder")
    for cls in (CountedExpert, type(expert)):
        loaded = cls.load(tmp_path / "new" / "folder")
        assert type(loaded) is type(expert)
        assert loaded.tokenizer is None
        assert_equal(loaded, expert)


def test_the_tokenizer_is_saved_with_it(tmp_path):
    NGramExpert.fit(["ab", "c"], tokenizer=tabular_tokenizer(4), progress=False).save(tmp_path)
    tokenizer = CountedExpert.load(str(tmp_path)).tokenizer
    assert tokenizer is not None
    assert tokenizer("bac")["input_ids"] == [2, 1, 3]
    # Saved over it, an expert without a tokenizer does not take the other's.
    quietly(NGramExpert, HAND).save(tmp_path)
    assert CountedExpert.load(tmp_path).tokenizer is None


def test_what_it_is_can_be_read_in_its_file(tmp_path):
    quietly(NaiveBayesExpert, HAND, window=3, pseudo_count=1e-10).save(tmp_path)
    assert json.loads((tmp_path / "counted_expert.json").read_text()) == {
        "kind": "naive_bayes",
        "window": 3,
        "pseudo_count": 1e-10,
        "vocab_size": V,
        "num_tokens": 7,
        "tokenizer": False,
        "format_version": 1,
    }


def test_what_cannot_be_loaded_says_why(tmp_path):
    with pytest.raises(ConfigError, match=r"is no counted expert: it has no counted_expert\.json"):
        CountedExpert.load(tmp_path)
    quietly(NaiveBayesExpert, HAND).save(tmp_path)
    with pytest.raises(ConfigError, match=r"a NaiveBayesExpert, not a NGramExpert\. Use Naive"):
        NGramExpert.load(tmp_path)
    file = tmp_path / "counted_expert.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2}))
    with pytest.raises(ConfigError, match=r"format 2, and this trl_ext reads formats up to 1\. "):
        CountedExpert.load(tmp_path)
    (tmp_path / "counts.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no counts\.safetensors\. Give a directory"):
        CountedExpert.load(tmp_path)


DESCRIPTION = "counted_expert.json"


def described(folder, **changes):
    """Change the description; None takes a key away."""
    file = folder / DESCRIPTION
    changed = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "trigram"}, r"kind is 'trigram', none of naive_bayes, ngram\."),
        (
            {"kind": "naive_bayes", "window": 2},
            r"holds counts\.1, .*, not the tables of length 1 to",
        ),
        ({"order": 2}, r"holds counts\.1, .*, not the tables of length 1 to 1"),
        ({"order": 4}, r"not the tables of length 1 to 3"),
        ({"order": 10**12}, r"not the tables of length 1 to 999999999999"),
        ({"order": "3"}, r"order is '3', not a whole number from 1 on"),
        ({"vocab_size": 6}, r"vocab_size is 6, and counts\.safetensors counts 5 tokens"),
        ({"num_tokens": 8}, r"its tokens are not 8, each counted 0 times or more"),
        ({"pseudo_count": math.nan}, r"pseudo_count is nan; it must be at most 1e\+15"),
        ({"pseudo_count": 0}, r"pseudo_count is 0; "),
        ({"pseudo_count": -1}, r"pseudo_count is -1; "),
        ({"pseudo_count": None}, r"pseudo_count is None; "),
        ({"tokenizer": None}, r"tokenizer is None, neither true nor false"),
        ({"tokenizer": True}, r"its tokenizer cannot be opened: "),
        ({"format_version": None}, r"format_version is None, not a whole number"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, changes, says):
    quietly(NGramExpert, HAND, order=3).save(tmp_path)
    described(tmp_path, **changes)
    with pytest.raises(ConfigError, match=rf"is damaged: .*{says}"):
        CountedExpert.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "\x00"])
def test_a_description_that_is_none_is_refused(tmp_path, text):
    quietly(NGramExpert, HAND).save(tmp_path)
    (tmp_path / DESCRIPTION).write_text(text)
    with pytest.raises(ConfigError, match=r"json is damaged: it is .* Count the expert anew"):
        CountedExpert.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("tokens", lambda t: t[:-1], r"vocab_size is 5, and"),
        ("tokens", lambda t: t - 20 * (t == 1), r"its tokens are not 7"),
        ("tokens", lambda t: t.float(), r"tokens is \(5,\) torch\.float32, not \(N,\) int64"),
        ("pairs.1", lambda t: t.flip(0), r"pairs\.1 must ascend"),
        ("pairs.1", lambda t: t + V**2, r"pairs\.1 must ascend from 0 or more to less than 25"),
        ("pairs.1", lambda t: t - t[0] - 1, r"pairs\.1 must ascend"),
        ("pairs.2", lambda t: t[:-1], r"counts\.2 must be the 2 counts of pairs\.2"),
        ("pairs.2", lambda t: t[None], r"pairs\.2 is \(1, 3\) torch\.int64"),
        ("counts.1", lambda t: -t, r"counts\.1 must be the 4 counts of pairs\.1, each 1 or more"),
        ("counts.1", lambda t: t * 0, r"counts\.1 must be"),
        ("counts.1", lambda t: t * 100, r"counts\.1 must be .* together at most 7\."),
        ("counts.2", lambda t: t[:-1], r"counts\.2 must be"),
        ("row_keys.2", lambda t: t.flip(0), r"row_keys\.2 must ascend"),
        ("row_keys.2", lambda t: t[:-1], r"pairs\.2 must ascend from 0 or more to less than 5\."),
        ("row_keys.2", lambda t: t + V**2, r"row_keys\.2 must ascend"),
        ("row_keys.2", None, r"it holds .*, not the tables of length 1 to 2"),
    ],
)
def test_counts_that_are_none_are_refused(tmp_path, name, change, says):
    quietly(NGramExpert, HAND, order=3).save(tmp_path)
    tensors = load_file(tmp_path / "counts.safetensors")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, tmp_path / "counts.safetensors")
    with pytest.raises(ConfigError, match=rf" is damaged: {says}.* Count the expert anew"):
        CountedExpert.load(tmp_path)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_counts_that_are_cut_are_refused(tmp_path, cut):
    quietly(NGramExpert, HAND).save(tmp_path)
    file = tmp_path / "counts.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ConfigError, match=r"it cannot be read as safetensors: "):
        CountedExpert.load(tmp_path)


def test_a_save_that_is_stopped_leaves_no_other_expert(tmp_path, monkeypatch):
    old = quietly(NGramExpert, HAND, order=3)
    old.save(tmp_path)
    new = quietly(NaiveBayesExpert, HAND, window=2)
    # While it writes, the old one stays.
    with monkeypatch.context() as patch:
        patch.setattr(counted_base, "save_counts", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            new.save(tmp_path)
    assert_equal(CountedExpert.load(tmp_path), old)
    # While it puts files in place, there is none.
    moved = []
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *names: moved.append(names) or exec("1/0"))
        with pytest.raises(ZeroDivisionError):
            new.save(tmp_path)
    assert moved[0][1] == tmp_path / "counts.safetensors"
    with pytest.raises(ConfigError, match=r"is no counted expert: it has no counted_expert"):
        CountedExpert.load(tmp_path)
    new.save(tmp_path)
    assert_equal(CountedExpert.load(tmp_path), new)
    assert {file.name for file in tmp_path.iterdir()} == {DESCRIPTION, "counts.safetensors"}


def test_a_save_takes_the_older_tokenizer_away_and_nothing_else(tmp_path):
    def template():
        loaded = CountedExpert.load(tmp_path).tokenizer
        assert loaded is not None
        return loaded.chat_template

    (tmp_path / "notes.txt").write_text("mine")
    tokenizer = tabular_tokenizer(4)
    tokenizer.chat_template = "{{ messages }}"
    NGramExpert.fit(["ab"], tokenizer=tokenizer, progress=False).save(tmp_path)
    assert template() == "{{ messages }}"
    NGramExpert.fit(["ab"], tokenizer=tabular_tokenizer(4), progress=False).save(tmp_path)
    assert template() is None
    quietly(NGramExpert, HAND).save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        DESCRIPTION, "counts.safetensors", "notes.txt",
    }  # fmt: skip


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
def test_no_expert_is_saved_over_a_model(tmp_path, file):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ConfigError, match=rf"is a language model's folder: it has a {file}\. A"):
        quietly(NGramExpert, HAND).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file]


def test_how_many_it_has_counted():
    # 0, 1, 2; then 01, 10, 12, 11; then 010, 101, 012.
    orders = [quietly(NGramExpert, HAND, order=order) for order in (1, 2, 3)]
    assert [expert.num_distinct for expert in orders] == [3, 4, 3]
    # Two places apart: 0.0, 1.1, 0.2.
    assert quietly(NaiveBayesExpert, HAND, window=2).num_distinct == 3


@pytest.mark.parametrize("cls", [NaiveBayesExpert, NGramExpert])
def test_the_largest_pseudo_count_still_gives_probabilities(cls):
    expert = quietly(cls, HAND, pseudo_count=1e15)
    assert probabilities(expert, [1]) == pytest.approx([1 / V] * V)
    assert expert.prior_entropy == pytest.approx(math.log(V))
    for more in (1e16, 1e308, 10**400):
        with pytest.raises(ConfigError, match=r"it must be at most 1e\+15 and a positive"):
            quietly(cls, HAND, pseudo_count=more)


@pytest.mark.parametrize("value", [0, 0.0, -1.0, math.nan, math.inf, "1", None, True])
def test_a_pseudo_count_that_does_not_smooth_is_refused(value):
    for cls in (NaiveBayesExpert, NGramExpert):
        with pytest.raises(ConfigError, match=r"pseudo_count is .*a positive finite number\. With"):
            quietly(cls, HAND, pseudo_count=value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_a_size_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match=rf"window is {value}; it must be a whole number from 1"):
        quietly(NaiveBayesExpert, HAND, window=value)
    with pytest.raises(ConfigError, match=rf"order is {value}; it must be a whole number from 1"):
        quietly(NGramExpert, HAND, order=value)
    if value is not None:
        with pytest.raises(ConfigError, match=rf"vocab_size is {value}; it must be a whole number"):
            quietly(NGramExpert, HAND, vocab_size=value)


@pytest.mark.parametrize(
    ("sequences", "arguments", "error", "text"),
    [
        ([], {}, DataError, r"corpus is empty: 0 sequences, 0 tokens.*read only once"),
        ([[], []], {}, DataError, r"corpus is empty: 2 sequences, 0 tokens"),
        ([[0], [1, 5]], {}, DataError, r"Sequence 1 has the token id 5, .* of 5 tokens, 0 to 4\."),
        ([[0], [-1]], {}, DataError, r"Sequence 1 has the token id -1, which is outside"),
        ([[2**40]], {}, DataError, r"token id 1099511627776"),
        ([[0], [1.5]], {}, DataError, r"Sequence 1 is list \[1\.5\]; a sequence is a list"),
        ([[True]], {}, DataError, r"Sequence 0 is list \[True\]; "),
        ([[[0]]], {}, DataError, r"Sequence 0 is list \[\[0\]\]; "),
        ([[[0], [0, 1]]], {}, DataError, r"Sequence 0 is list \[\[0\], \[0, 1\]\]; "),
        ([0, 1], {}, DataError, r"Sequence 0 is int 0; a sequence is a list"),
        ([None], {}, DataError, r"Sequence 0 is NoneType None; "),
        (None, {}, DataError, r"sequences is NoneType None; it must be an iterable of sequences"),
        (5, {}, DataError, r"sequences is int 5; it must be an iterable"),
        (
            torch.tensor(5),
            {},
            DataError,
            r"sequences is Tensor tensor\(5\); it must be an iterable",
        ),
        ([torch.zeros(2, dtype=torch.bfloat16)], {}, DataError, r"Sequence 0 is Tensor tensor\(\["),
        ([torch.ones(2).to_sparse()], {}, DataError, r"(?s)Sequence 0 is Tensor .*; a sequence is"),
        (
            ["a", [1], "a\ud800"],
            {"tokenizer": tabular_tokenizer(4)},
            DataError,
            r"Sequence 2 has half a character, '\\ud800', at 1: 'a\\ud800'\. .* Repair it",
        ),
        ("ab", {}, DataError, r"sequences is a single text; .* Put it into a list"),
        ({"train": HAND}, {}, DataError, r"sequences is a mapping; .* Take one of its splits"),
        ([[0], "ab"], {}, ConfigError, r"Sequence 1 is the text 'ab', and there is no tokenizer\."),
        (HAND, {"vocab_size": None}, ConfigError, r"vocab_size is missing, .* Give vocab_size"),
        (HAND, {"add_eos": True}, ConfigError, r"add_eos is True, but there is no tokenizer"),
        (HAND, {"column": "text"}, ConfigError, r"column is 'text', but sequence 0 is a list"),
        (
            [{"text": "a", "input_ids": [1]}],
            {},
            ConfigError,
            r"both 'text' and 'input_ids'; its columns are text, input_ids\. Set column",
        ),
        ([{"ids": [1]}], {}, ConfigError, r"neither 'text' nor 'input_ids'; its columns are ids"),
        (
            Dataset.from_dict({"text": ["a"]}),
            {"column": "txt"},
            ConfigError,
            r"column is 'txt', and the dataset has no such column; its columns are text\.",
        ),
        (
            ["a", [1]],
            {"add_eos": True, "tokenizer": tabular_tokenizer(4)},
            ConfigError,
            r"add_eos is True, and sequence 1 is token ids; the end token is added to texts only",
        ),
    ],
)
def test_a_corpus_that_cannot_be_counted_says_why(sequences, arguments, error, text):
    for cls in (NaiveBayesExpert, NGramExpert):
        with pytest.raises(error, match=text):
            quietly(cls, sequences, **arguments)


def test_a_wrong_sequence_keeps_its_number_behind_the_first_batch(monkeypatch):
    monkeypatch.setattr(corpus_module, "SEQUENCES_AT_ONCE", 2)
    with pytest.raises(DataError, match="Sequence 4 has the token id 9"):
        quietly(NGramExpert, [[0], [1], [2], [3], [9]])
    with pytest.raises(ConfigError, match="Sequence 3 is the text"):
        quietly(NGramExpert, [[0], [1], [2], "a"])


LOOK_UPS = ("log_probs", "next_log_probs", "token_log_probs")


@pytest.mark.parametrize("look_up", LOOK_UPS)
@pytest.mark.parametrize(
    ("ids", "mask", "text"),
    [
        ([[0, 1]], None, r"input_ids is a list; it must be a tensor \(B, T\) of integers\. For"),
        (torch.zeros(2), None, r"input_ids is \(2,\) float32; it must be"),
        (torch.zeros(2, 2), None, r"input_ids is \(2, 2\) float32; "),
        (torch.zeros(2, dtype=torch.long), None, r"input_ids is \(2,\) int64; "),
        (torch.zeros(2, 2, dtype=torch.bool), None, r"input_ids is \(2, 2\) bool; "),
        (torch.tensor([[0], [5]]), None, r"token id 5 in sequence 1, at 0; .* has 5 tokens, 0 to"),
        (torch.tensor([[0, -100]]), None, r"token id -100 in sequence 0, at 1; .* Mask padding"),
        (
            torch.tensor([[0, 1]]),
            torch.ones(1, 3),
            r"attention_mask is \(1, 3\) float32, and input_ids is \(1, 2\) int64; .* same shape",
        ),
        (torch.tensor([[0, 1]]), [[1, 1]], r"attention_mask is a list, and input_ids is"),
        (
            torch.zeros(1, 2, dtype=torch.long, device="meta"),
            None,
            r"input_ids is on meta, and the expert's counts are on cpu\. .*expert\.to\('meta'\)",
        ),
        (
            torch.tensor([[0, 1]]),
            torch.ones(1, 2, device="meta"),
            r"attention_mask is on meta, and the expert's counts are on cpu",
        ),
    ],
)
def test_an_input_that_cannot_be_looked_up_says_why(look_up, ids, mask, text):
    expert = quietly(NGramExpert, HAND)
    with pytest.raises(ConfigError, match=text):
        getattr(expert, look_up)(ids, mask)


def test_all_tables_move_to_another_device():
    for expert in any_experts():
        assert expert.to("meta") is expert
        assert expert.device.type == "meta"
        tensors = [value for value in vars(expert).values() if isinstance(value, torch.Tensor)]
        tensors.append(expert._counts.tokens)
        for table in expert._counts.tables:
            tensors += [table.pairs, table.counts]
            tensors += [] if table.row_keys is None else [table.row_keys]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
