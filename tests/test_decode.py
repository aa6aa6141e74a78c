"A head on small random models of many architectures"
import copy, math, pickle, threading

import pytest, torch
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

from simpledeco.decode import attach, check_plain_logits, divisor, min_p_filter, sampling
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model
from conftest import ROOT

SIZE = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=128,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
KINDS = dict(llama=SIZE, qwen2=SIZE, qwen3=SIZE, gemma=SIZE,
             mixtral=SIZE | dict(num_local_experts=4), phi3=SIZE, olmo2=SIZE, gpt_neox=SIZE,
             gpt2=dict(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=128,
                       pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False))


def tiny(kind, **kw):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(KINDS.get(kind, SIZE) | kw))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20) # logits of several nats, as of a trained model
    return model


def head_for(model, reads='logits', seed=1):
    "A head whose temperatures differ from token to token"
    torch.manual_seed(seed)
    size, marks = model.get_output_embeddings().weight.shape[1], fingerprint(model)
    return TemperatureHead(size, reads=reads, base_model=marks).eval()


def direct(head, hidden, logits, scale):
    "z / (scale T) in float64, without the code under test"
    x = hidden if head.reads == 'hidden' else head.live_inputs(hidden, logits)
    tau = copy.deepcopy(head).double().net((x.double() - head.mean.double())/head.std.double())[..., 0]
    return logits.double()/(scale*tau.clamp(head.t_min, head.t_max))[..., None]


IDS = torch.tensor([[5, 17, 40, 99, 7, 250, 31]])


@pytest.mark.parametrize('reads', ['logits', 'hidden'])
@pytest.mark.parametrize('kind', KINDS)
def test_logits_are_divided_and_the_model_is_restored(kind, reads):
    model = tiny(kind)
    head = head_for(model, reads)
    weights = {k: v.clone() for k,v in model.state_dict().items()}
    with torch.no_grad():
        base, hidden = model(IDS).logits, model.base_model(IDS).last_hidden_state
        with attach(model, head, scale=1.7): divided = model(IDS).logits
        after = model(IDS).logits
    assert divided.dtype == torch.float32 and not torch.allclose(divided, base)
    torch.testing.assert_close(divided.double(), direct(head, hidden, base, 1.7), rtol=1e-4, atol=1e-4)
    assert torch.equal(after, base) and not model.get_output_embeddings()._forward_hooks
    assert all(torch.equal(v, weights[k]) for k,v in model.state_dict().items())


@pytest.mark.parametrize('kind', KINDS)
def test_greedy_is_the_same_and_sampling_is_not(kind):
    model = tiny(kind)
    head, kw = head_for(model), dict(attention_mask=torch.ones_like(IDS), max_new_tokens=12)
    plain = model.generate(IDS, do_sample=False, **kw)
    torch.manual_seed(0); hot = model.generate(IDS, do_sample=True, top_k=0, min_p=.1, **kw)
    with attach(model, head, scale=5):
        assert torch.equal(model.generate(IDS, do_sample=False, **kw), plain)
        torch.manual_seed(0); hotter = model.generate(IDS, **sampling(head), **kw)
    assert hotter.shape != hot.shape or not torch.equal(hotter, hot)


def test_every_sampled_token_is_a_candidate():
    "Sampled text, checked afterwards against the closed form: gap <= T log(1/min_p)"
    model = tiny('llama')
    head = head_for(model)
    with attach(model, head, scale=2.):
        out = model.generate(IDS.expand(16, -1), attention_mask=torch.ones(16, 7),
                             max_new_tokens=20, **sampling(head))
    with torch.no_grad(): z = model(out).logits[:, 6:-1]
    T, token = 2*head.temperature(head.live_inputs(z, z)).detach(), out[:, 7:]
    gap = z.max(-1).values - z.gather(-1, token[..., None])[..., 0]
    lived = (token != 0).cummin(1).values # until the end of the text
    assert (gap <= T*math.log(10) + 1e-4)[lived].all() and (gap[lived] > 0).any()
    assert (token[lived] != z.argmax(-1)[lived]).float().mean() > .2


def test_left_padding_does_not_change_the_temperature():
    model = tiny('qwen3')
    head = head_for(model)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), IDS], 1)
    mask = torch.tensor([[0]*5 + [1]*7])
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), attach(model, head):
        torch.testing.assert_close(model(padded, attention_mask=mask,
                                         position_ids=position).logits[:, 5:], model(IDS).logits,
                                   rtol=1e-4, atol=1e-4)
    with attach(model, head):
        alone = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8,
                               do_sample=False)
        assert torch.equal(model.generate(padded, attention_mask=mask, max_new_tokens=8,
                                          do_sample=False)[:, 5:], alone)


def test_static_cache_gives_the_same_tokens():
    model = tiny('llama')
    head, kw = head_for(model), dict(attention_mask=torch.ones_like(IDS), max_new_tokens=10)
    with attach(model, head, scale=3.):
        torch.manual_seed(0); dynamic = model.generate(IDS, **sampling(head), **kw)
        torch.manual_seed(0)
        assert torch.equal(model.generate(IDS, cache_implementation='static', **sampling(head),
                                          **kw), dynamic)


def test_beam_search_ranks_by_the_divided_logits():
    "Two beams and two steps, against an enumeration of all pairs of tokens"
    model = tiny('llama')
    head, found = head_for(model), {}
    with attach(model, head, scale=3.):
        out = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2,
                             min_new_tokens=2, num_beams=300, do_sample=False, output_scores=True,
                             return_dict_in_generate=True)
        with torch.no_grad():
            # the end of the text is not allowed yet
            end = torch.tensor([2])
            first = model(IDS).logits[0, -1].log_softmax(-1).index_fill(0, end, -torch.inf)
            pairs = torch.cat([IDS.expand(300, -1), torch.arange(300)[:, None]], 1)
            second = model(pairs).logits[:, -1].log_softmax(-1).index_fill(1, end, -torch.inf)
    best = (first[:, None] + second).flatten().argmax().item()
    assert out.sequences[0, 7:].tolist() == [best//300, best % 300]


def test_compiled_before_or_after_attaching():
    model = tiny('llama')
    head = head_for(model)
    compiled = torch.compile(model, backend='eager')
    with torch.no_grad():
        base = compiled(IDS).logits
        with attach(model, head): divided, eager = compiled(IDS).logits, model(IDS).logits
        torch.testing.assert_close(divided, eager)
        assert not torch.allclose(divided, base)
        torch.testing.assert_close(compiled(IDS).logits, base)


def test_pipeline():
    model, tokenizer = load_model(ROOT/'models/smoke')
    head = head_for(model)
    ask = pipeline('text-generation', model=model, tokenizer=tokenizer)
    texts, kw = ['One plus one is', 'Once'], dict(max_new_tokens=6, return_full_text=False)
    plain = [x[0]['generated_text'] for x in ask(texts, do_sample=False, **kw)]
    with attach(model, head, scale=4.):
        assert [x[0]['generated_text'] for x in ask(texts, do_sample=False, **kw)] == plain
        assert [x[0]['generated_text'] for x in ask(texts, **sampling(head), **kw)] != plain


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_order_of_the_logits(dtype):
    model = tiny('llama').to(dtype)
    head = head_for(model)
    ids = torch.randint(3, 300, (40, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base, hidden = model(ids).logits, model.base_model(ids).last_hidden_state
        with attach(model, head, scale=.9): divided = model(ids).logits
        T = .9*head.temperature(head.live_inputs(hidden, base))
    assert base.dtype == dtype and T.dtype == divided.dtype == torch.float32
    assert torch.equal(divided, base.float()/T[..., None])
    order = base.float().argsort(dim=-1, stable=True)
    assert (divided.gather(-1, order).diff(dim=-1) >= 0).all()
    assert torch.equal(divided.argmax(-1), base.argmax(-1))


def test_neighbours_in_half_precision_do_not_become_equal():
    """The two largest logits are neighbours in bfloat16; rounding the quotient to it would let the
    first of the vocabulary win"""
    low = torch.arange(128, 256).to(torch.bfloat16)/4
    z = torch.zeros(len(low), 300, dtype=torch.bfloat16)
    z[:, 10], z[:, 20] = low, torch.nextafter(low, torch.full_like(low, torch.inf))
    head = TemperatureHead(32).eval()
    divided = z/divisor(z, z[:, :32], head)
    assert divided.dtype == torch.float32 and (divided.argmax(-1) == 20).all()
    assert (z.argmax(-1) == 20).all()
    assert (divided.to(torch.bfloat16).argmax(-1) == 10).any()


@pytest.mark.parametrize('kind, kw',
                         [('gemma2', {}), ('cohere', {}), ('granite', dict(logits_scaling=8.))])
def test_architectures_that_change_their_logits_afterwards_are_refused(kind, kw):
    model = tiny(kind, **kw)
    with pytest.raises(ValueError, match='after the output embedding'): attach(model, head_for(model))
    assert not model.get_output_embeddings()._forward_hooks


@pytest.mark.parametrize('kind, kw',
                         [('gemma2', dict(final_logit_softcapping=None)),
                          ('cohere', dict(logit_scale=1.)), ('granite', dict(logits_scaling=1.))])
def test_the_same_architectures_without_that_change_are_fine(kind, kw):
    check_plain_logits(tiny(kind, **kw))


def test_a_second_head_and_a_foreign_head():
    model = tiny('llama')
    other = head_for(tiny('qwen2'))
    with attach(model, head_for(model)):
        with pytest.raises(ValueError, match='remove it first'): attach(model, head_for(model))
    with pytest.raises(ValueError, match='trained for base model'): attach(model, other)
    with torch.no_grad(), attach(model, other, other_model=True):
        assert torch.isfinite(model(IDS).logits).all()


# Settings that popular instruction models ship in their generation_config.json
SHIPPED = dict(qwen=dict(do_sample=True, temperature=.7, top_p=.8, top_k=20, repetition_penalty=1.05),
               llama=dict(do_sample=True, temperature=.6, top_p=.9),
               gemma=dict(do_sample=True, top_k=64, top_p=.95))
# and what else a configuration may hold that changes a distribution
RARE = dict(min_p=.5, top_h=.4, typical_p=.5, epsilon_cutoff=.02, eta_cutoff=.02,
            encoder_repetition_penalty=1.5, no_repeat_ngram_size=1,
            encoder_no_repeat_ngram_size=1, guidance_scale=3., num_beams=3,
            sequence_bias=[[[5], 9.]], exponential_decay_length_penalty=(1, 3.))


def candidates(model, ids, **kw):
    "Which tokens may come next, and with which probability"
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1,
                         output_scores=True, return_dict_in_generate=True, **kw)
    return out.scores[0].softmax(-1)


@pytest.mark.parametrize('name, shipped', [*SHIPPED.items(), *((k, {k: v}) for k,v in RARE.items())])
def test_a_models_own_settings_do_not_change_what_is_sampled(name, shipped):
    model, ids = tiny('llama'), torch.tensor([[5, 17, 40, 17, 99, 7, 250, 31]])
    head = head_for(model)
    with torch.no_grad(), attach(model, head, scale=3.):
        wanted = min_p_filter(model(ids).logits[:, -1], head.min_p).softmax(-1)
        model.generation_config.update(**shipped)
        torch.testing.assert_close(candidates(model, ids, **sampling(head)), wanted)


def test_transformers_finds_no_option_of_ours_invalid(monkeypatch):
    model, said = tiny('llama'), []
    monkeypatch.setattr('transformers.generation.configuration_utils.logger.warning_once', said.append)
    monkeypatch.setattr('transformers.generation.configuration_utils.logger.warning', said.append)
    with attach(model, head := head_for(model)): candidates(model, IDS, **sampling(head))
    assert not [x for x in said if 'not valid' in x], said


def test_what_may_be_said_and_where_a_text_ends_stays_the_models_own():
    model = tiny('llama')
    head = head_for(model)
    model.generation_config.update(bad_words_ids=[[7]], eos_token_id=list(range(100, 300)))
    with attach(model, head, scale=9.):
        assert candidates(model, IDS, **sampling(head))[0, 7] == 0
        out = model.generate(IDS.expand(8, -1), attention_mask=torch.ones(8, 7), max_new_tokens=30,
                             **sampling(head))[:, 7:]
    ended = (out >= 100).cumsum(1) - (out >= 100).long()
    assert (out[ended > 0] == 0).all() and (out >= 100).any(1).all()


@pytest.mark.parametrize('temperature', [.5, 2.])
def test_min_p_comes_after_a_temperature_that_is_given_beside(temperature):
    model = tiny('llama')
    model.generation_config.update(**SHIPPED['qwen'])
    head = head_for(model)
    with torch.no_grad(), attach(model, head, scale=2.):
        z = model(IDS).logits[:, -1]
        wanted, before = (min_p_filter(x, head.min_p) for x in (z/temperature, z))
        found = candidates(model, IDS, temperature=temperature, **sampling(head))
    torch.testing.assert_close(found, wanted.softmax(-1))
    assert (found > 0).sum() != torch.isfinite(before).sum()


def test_two_threads_attach_one_head():
    model = tiny('llama')
    head, results = head_for(model), []
    def work(barrier):
        barrier.wait()
        try: results.append(attach(model, head))
        except ValueError as e: results.append(str(e))
    for _ in range(20):
        results.clear()
        barrier = threading.Barrier(2)
        threads = [threading.Thread(target=work, args=(barrier,)) for _ in range(2)]
        for t in threads: t.start()
        for t in threads: t.join()
        refused = [x for x in results if isinstance(x, str)]
        assert len(refused) == 1 and 'remove it first' in refused[0]
        assert len(model.get_output_embeddings()._forward_hooks) == 1
        next(x for x in results if not isinstance(x, str)).remove()


def test_a_model_with_a_head_is_not_copied_and_its_output_embedding_not_replaced():
    model = tiny('llama')
    head = head_for(model)
    with attach(model, head):
        with pytest.raises(ValueError, match='cannot be copied or pickled'): copy.deepcopy(model)
        with pytest.raises(ValueError, match='cannot be copied or pickled'): pickle.dumps(model)
        model.resize_token_embeddings(310)
        with pytest.raises(ValueError, match='was replaced while a head was attached'): model(IDS)
    assert model(IDS).logits.shape[-1] == 310 and not model._forward_pre_hooks
    assert not copy.deepcopy(model).get_output_embeddings()._forward_hooks


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(ValueError, match='looks at the tokens that follow'):
        check_plain_logits(tiny('bert'))
    check_plain_logits(tiny('bert', is_decoder=True))


def spaced(*words): # a tokenizer whose decoder drops the space where a text begins, as that of Llama 2 does
    from tokenizers import decoders, models, pre_tokenizers, Tokenizer
    from transformers import PreTrainedTokenizerFast
    vocabulary = {w: i for i,w in enumerate(['<unk>', *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token='<unk>')


def test_a_word_is_known_where_the_decoder_drops_its_space():
    from simpledeco.decode import capitals, greedy_at_capitals
    tokenizer = spaced('▁a', '▁Paris', 'Paris', '▁paris', '▁É', '▁1')
    assert tokenizer.decode([2]) == 'Paris'
    assert capitals(tokenizer).tolist() == [False, False, True, False, False, True, False]
    with pytest.raises(ValueError, match='never be greedy'): greedy_at_capitals(spaced('▁a', 'Paris', 'b'), temperature=1.)
