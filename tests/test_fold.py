"A linear head as a row of the output matrix: the checkpoint, and what reads it in transformers"
import copy, json, math, shutil

import pytest, torch
from safetensors.torch import load_file, save_file
from test_decode import IDS, KINDS, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from simpledeco.decode import attach, sampling
from simpledeco.fold import fold, head_logprobs, row_logprobs, RowTemperature
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, load_model, read_output
from simpledeco.vllm import read_row, SETTINGS, temper_rows

MASK = dict(attention_mask=torch.ones_like(IDS))


def linear_head(model, seed=1):
    "A linear head on the hidden state whose temperatures differ from token to token, with a standardisation of its own"
    torch.manual_seed(seed)
    d = model.get_output_embeddings().weight.shape[1]
    head = TemperatureHead(d, width=0, reads='hidden', base_model=fingerprint(model)).eval()
    head.mean, head.std, head.offset = torch.randn(d)/4, torch.rand(d) + .5, torch.tensor(.2)
    return head


def stored(folder, model, tokens=300):
    "A model in a folder, with a tokenizer of so many tokens"
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({f'w{i}': i for i in range(tokens)}, unk_token='w5'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(folder, max_shard_size='20KB')
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token='w2').save_pretrained(folder)
    (folder/'LICENSE').write_text('as it is')
    return folder


def made(tmp_path, kind='llama', tokens=300, dtype=torch.float32, **kw):
    "A tiny model in a folder, a head for it in another, and both folded: (model, head, source, folded)"
    model = tiny(kind, **kw).to(dtype)
    head, source = linear_head(model), stored(tmp_path/'model', model, tokens)
    head.save_pretrained(tmp_path/'head')
    return model, head, source, fold(tmp_path/'head', source, tmp_path/'folded')


def tensors(folder): return {k: v for p in sorted(folder.glob('*.safetensors')) for k,v in load_file(p).items()}


def custom(folder): return dict(custom_generate=str(folder), trust_remote_code=True)


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('tokens', [300, 290])
@pytest.mark.parametrize('kind', ['llama', 'gemma', 'qwen3', 'gpt_neox', 'gpt2'])
def test_all_but_the_row_keeps_its_bytes(kind, tokens, tied, tmp_path):
    model, head, source, folded = made(tmp_path, kind, tokens, tie_word_embeddings=tied)
    before, after, row = tensors(source), tensors(folded), json.loads((folded/SETTINGS).read_text())['row']
    assert row == tokens and before.keys() == after.keys()
    for key,old in before.items():
        new = after[key]
        if old.shape[:1] == (300,):
            assert new.shape[0] == max(300, row + 1)
            new, old = (torch.cat([x[:row], x[row + 1:]]) for x in (new, old))
        assert torch.equal(new.contiguous().view(torch.uint8), old.contiguous().view(torch.uint8)), key
    changed = [k for k in before if before[k].shape != after[k].shape or not torch.equal(before[k], after[k])]
    assert len(changed) == (1 if tied or tokens < 300 else 2), changed
    assert (folded/'LICENSE').read_text() == 'as it is'
    assert json.loads((folded/'config.json').read_text())['vocab_size'] == max(300, row + 1)


@pytest.mark.parametrize('kind', sorted(KINDS.keys() - {'qwen2'})) # Qwen2's tokenizer is a class of its own, which ours is not
def test_the_row_is_the_heads_temperature(kind, tmp_path):
    model, head, source, folded = made(tmp_path, kind)
    ours, _ = load_model(folded)
    read = RowTemperature(**ours.generation_config.simpledeco)
    with torch.no_grad():
        hidden, z = model.base_model(IDS).last_hidden_state, ours(IDS).logits
        unit = (hidden.double() - head.mean.double())/head.std.double()
        double = unit @ head.net[0].weight[0].double() + head.net[0].bias.double() + head.offset.double()
        torch.testing.assert_close(z[..., :300], model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert double.std() > .1
    torch.testing.assert_close(read.temperature(z).double(), double.clamp(head.t_min, head.t_max), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision_and_its_error_is_stated(dtype, tmp_path):
    model, head, source, folded = made(tmp_path, dtype=dtype)
    said = json.loads((folded/SETTINGS).read_text())
    assert {v.dtype for v in tensors(folded).values()} == {dtype} and said['dtype'] == str(dtype).removeprefix('torch.')
    assert 0 < said['error'] < .1
    assert 0 < json.loads((made(tmp_path/'b')[3]/SETTINGS).read_text())['error'] < 1e-4


def test_generate_with_the_row_is_generate_with_attach(tmp_path):
    "The row is a padded one here, so that both models have as many logits and draw with the same random numbers"
    model, head, source, folded = made(tmp_path, tokens=290)
    ours, _ = load_model(folded)
    # a random model would say them; the row must be read before it is suppressed
    kw, padded = MASK | dict(max_new_tokens=30), list(range(290, 300))
    greedy = model.generate(IDS, do_sample=False, suppress_tokens=padded, **kw)
    assert torch.equal(ours.generate(IDS, do_sample=False, suppress_tokens=padded[1:], **kw, **custom(folded)), greedy)
    found = []
    for seed in range(5):
        torch.manual_seed(seed); found.append(ours.generate(IDS, suppress_tokens=padded[1:], **kw, **custom(folded)))
        with attach(model, head): torch.manual_seed(seed); wanted = model.generate(IDS, **sampling(head), suppress_tokens=padded, **kw)
        assert torch.equal(wanted, found[-1])
    assert len({tuple(x[0].tolist()) for x in found}) > 1 and not any((x == greedy).all() for x in found if x.shape == greedy.shape)


def test_with_a_row_behind_the_last_greedy_text_and_first_draws_are_those_of_attach(tmp_path):
    model, head, source, folded = made(tmp_path)
    ours, _ = load_model(folded)
    greedy = dict(do_sample=False, max_new_tokens=30, **MASK)
    assert torch.equal(ours.generate(IDS, **greedy, **custom(folded)), model.generate(IDS, **greedy))
    found = set()
    for seed in range(40):
        torch.manual_seed(seed); one = ours.generate(IDS, max_new_tokens=1, **MASK, **custom(folded))
        with attach(model, head):
            torch.manual_seed(seed)
            assert torch.equal(model.generate(IDS, max_new_tokens=1, **sampling(head), **MASK), one)
        found.add(one[0, -1].item())
    assert len(found) > 2


def test_scores_are_those_of_attach_with_a_scale_and_a_temperature_beside(tmp_path):
    model, head, source, _ = made(tmp_path)
    folded = fold(tmp_path/'head', source, tmp_path/'hot', scale=3.)
    ours, _ = load_model(folded)
    kw = MASK | dict(max_new_tokens=1, temperature=.5, output_scores=True, return_dict_in_generate=True)
    with attach(model, head, scale=3.): wanted = model.generate(IDS, **sampling(head), **kw).scores[0]
    found = ours.generate(IDS, **kw, **custom(folded)).scores[0]
    assert found[0, 300] == -math.inf and 1 < torch.isfinite(wanted).sum() < 300
    torch.testing.assert_close(found[:, :300], wanted, rtol=1e-4, atol=1e-4)


def test_raw_logits_are_left_alone_and_other_processors_still_run(tmp_path):
    model, head, source, folded = made(tmp_path)
    ours, _ = load_model(folded)
    seen = []
    def watch(ids, scores): seen.append(scores.clone()); return scores
    out = ours.generate(IDS, **MASK, max_new_tokens=2, output_logits=True, return_dict_in_generate=True,
                        logits_processor=[watch], **custom(folded))
    assert len(seen) == 2 and all(torch.equal(a, b) and torch.isfinite(b).all() for a,b in zip(seen, out.logits))


def test_a_model_that_was_loaded_with_its_own_code_needs_no_argument(tmp_path):
    model, head, source, folded = made(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(folded, trust_remote_code=True)
    torch.manual_seed(0); found = ours.generate(IDS, **MASK, max_new_tokens=12)
    torch.manual_seed(0); assert torch.equal(load_model(folded)[0].generate(IDS, **MASK, max_new_tokens=12, **custom(folded)), found)


def test_prompt_lookup_is_as_greedy_as_the_model(tmp_path):
    model, head, source, folded = made(tmp_path)
    ours, _ = load_model(folded)
    plain = model.generate(IDS, **MASK, max_new_tokens=30, do_sample=False)
    assert torch.equal(ours.generate(IDS, **MASK, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=3, **custom(folded)), plain)


def test_min_p_is_the_heads_unless_the_call_names_one(tmp_path):
    folded = made(tmp_path)[3]
    ours, _ = load_model(folded)
    kept = lambda **kw: torch.isfinite(ours.generate(IDS, **MASK, max_new_tokens=1, output_scores=True, return_dict_in_generate=True,
                                                     **kw, **custom(folded)).scores[0]).sum(-1)
    assert json.loads((folded/'generation_config.json').read_text()).get('min_p') is None # vLLM would make it a default of every request
    usual = kept()
    assert torch.equal(usual, kept(min_p=.1)) and (kept(min_p=.02) > usual).all() and (usual > kept(min_p=.7)).all()


@pytest.mark.parametrize('speculate', [{}, dict(prompt_lookup_num_tokens=3)])
def test_temperatures_come_back_beside_the_tokens(speculate, tmp_path):
    model, head, source, folded = made(tmp_path)
    ours, _ = load_model(folded)
    repeated = IDS[:1].repeat(1, 3) # so that a lookup finds something
    with torch.no_grad():
        out = ours.generate(repeated, max_new_tokens=20, return_temperature=True, **speculate, **custom(folded))
        T = head.temperature(model.base_model(out.sequences).last_hidden_state)[:, repeated.shape[1] - 1:-1]
    assert out.temperatures.std() > .1
    torch.testing.assert_close(out.temperatures, T, rtol=1e-4, atol=1e-4)


def test_a_fresh_sample_has_an_importance_ratio_of_one_and_a_gradient(tmp_path):
    model, head, source, folded = made(tmp_path)
    ours, _ = load_model(folded)
    out = ours.generate(IDS, **MASK, temperature=1.3, max_new_tokens=20, output_scores=True, return_dict_in_generate=True,
                        **custom(folded))
    new = out.sequences[:, IDS.shape[1]:]
    wrote = torch.stack(out.scores, 1).log_softmax(-1).gather(-1, new[..., None])[..., 0]
    ours.requires_grad_(True)
    scored, T = row_logprobs(ours(out.sequences).logits[:, IDS.shape[1] - 1:-1], new, read_row(folded), temperature=1.3)
    assert new.numel() > 3 and T.std() > .1 and (scored - wrote).expm1().abs().max() < 1e-4
    scored.sum().backward()
    row = ours.get_output_embeddings().weight.grad[read_row(folded)['row']]
    assert torch.isfinite(row).all() and row.abs().max() > 0


@pytest.mark.parametrize('kw, message', [(dict(num_beams=2), 'among log-probabilities'), (dict(guidance_scale=2.), 'guidance mixes')])
def test_what_mixes_or_normalises_logits_is_refused(kw, message, tmp_path):
    model, head, source, folded = made(tmp_path)
    with pytest.raises(ValueError, match=message): load_model(folded)[0].generate(IDS, **MASK, max_new_tokens=3, **kw, **custom(folded))


def test_what_the_folder_brings_needs_no_simpledeco(tmp_path):
    code = (made(tmp_path)[3]/'custom_generate/generate.py').read_text()
    assert 'simpledeco import' not in code and 'import simpledeco' not in code


def with_head(tmp_path, change=lambda head: head):
    "A model and a head in folders, nothing folded: (head, model, out)"
    model = tiny('llama')
    stored(tmp_path/'model', model)
    change(linear_head(model)).save_pretrained(tmp_path/'head')
    return tmp_path/'head', tmp_path/'model', tmp_path/'out'


def test_heads_that_are_no_row(tmp_path):
    for reads,width,message in (('logits', 0, 'reads logits'), ('both', 0, 'reads both'), ('hidden', 4, '1 hidden layers')):
        other = lambda h: TemperatureHead(32, width=width, reads=reads, base_model=h.base_model)
        head, model, out = with_head(tmp_path/f'{reads}{width}', other)
        with pytest.raises(ValueError, match=f'{message}.*only a linear head'): fold(head, model, out)
        assert sorted(p.name for p in out.parent.iterdir()) == ['head', 'model']


def test_a_folder_folded_twice_and_a_head_of_another_model(tmp_path):
    model, head, source, folded = made(tmp_path)
    with pytest.raises(ValueError, match='has a row of a head already'): fold(tmp_path/'head', folded, tmp_path/'twice')
    with pytest.raises(ValueError, match='exists: choose another'): fold(tmp_path/'head', source, folded)
    linear_head(tiny('qwen2')).save_pretrained(tmp_path/'foreign')
    with pytest.raises(ValueError, match='was trained for base model'): fold(tmp_path/'foreign', source, tmp_path/'other')
    with pytest.raises(ValueError, match='trained for base model'): attach(load_model(folded)[0], head)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['folded', 'foreign', 'head', 'model']


@pytest.mark.parametrize('row, message', [(17, "row 17 is that of 'w17'"), (301, 'has 300 rows'), (-1, 'has 300 rows')])
def test_a_row_that_texts_use(row, message, tmp_path):
    with pytest.raises(ValueError, match=message): fold(*with_head(tmp_path), row=row)
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('scale', [0, -1., math.inf, math.nan, True])
def test_a_scale_that_is_none(scale, tmp_path):
    with pytest.raises(ValueError, match='scale is'): fold(*with_head(tmp_path), scale=scale)


def test_weights_of_another_kind(tmp_path):
    head, model, out = with_head(tmp_path)
    for path in model.glob('*.safetensors'): save_file({k: (v*9).to(torch.int8) for k,v in load_file(path).items()}, path)
    with pytest.raises(ValueError, match='are quantised .I8.'): fold(head, model, out)
    for path in model.glob('*.safetensors'): path.unlink()
    with pytest.raises(ValueError, match='no safetensors files'): fold(head, model, out)


SQUASHED = [('gemma2', dict(final_logit_softcapping=30.)), ('gemma2', dict(final_logit_softcapping=8.)),
            ('cohere', dict(logit_scale=.0625)), ('cohere', dict(logit_scale=.3)),
            ('granite', dict(logits_scaling=8.)), ('granite', dict(logits_scaling=3.))]

@pytest.mark.parametrize('kind, kw', SQUASHED)
def test_models_that_change_their_logits_afterwards(kind, kw, tmp_path):
    "T is the head's of the hidden state, in float64, and greedy text is the model's"
    model, head, source, folded = made(tmp_path, kind, tokens=290, **kw)
    ours, _ = load_model(folded)
    said = read_row(folded)
    assert said.get('cap') == kw.get('final_logit_softcapping') and said['error'] < 1e-4
    with torch.no_grad():
        hidden, z = model.base_model(IDS).last_hidden_state, ours(IDS).logits
        plain = (hidden @ model.get_output_embeddings().weight.T)[..., :290]
        base = model(IDS).logits
        unit = (hidden.double() - head.mean.double())/head.std.double()
        double = unit @ head.net[0].weight[0].double() + head.net[0].bias.double() + head.offset.double()
    assert (plain - base[..., :290]).abs().max() > .1, 'a model that leaves its logits as they are would prove nothing'
    torch.testing.assert_close(z[..., :290], base[..., :290], rtol=1e-5, atol=1e-5)
    T = RowTemperature(**ours.generation_config.simpledeco).temperature(z)
    assert double.std() > .1
    torch.testing.assert_close(T.double(), double.clamp(head.t_min, head.t_max), rtol=1e-4, atol=1e-4)
    padded = list(range(290, 300)) # a random model would say them
    kw = MASK | dict(max_new_tokens=12, do_sample=False)
    plain = model.generate(IDS, suppress_tokens=padded, **kw)
    assert torch.equal(ours.generate(IDS, suppress_tokens=padded[1:], **kw, **custom(folded)), plain)


def test_a_cap_is_undone_in_the_reader_of_vllm_and_in_the_scores_of_a_trainer(tmp_path):
    model, head, source, folded = made(tmp_path, 'gemma2', final_logit_softcapping=8.)
    s, z = read_row(folded), load_model(folded)[0](IDS).logits[0].detach()
    T = head.temperature(model.base_model(IDS).last_hidden_state[0]).detach()
    read = temper_rows(z.clone(), torch.ones(len(z)), torch.full((len(z),), math.inf), s)
    torch.testing.assert_close(read[:, :300], z[:, :300]/T[:, None], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(row_logprobs(z, z[:, :300].argmax(-1), s)[1], T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind, said', [('gemma2', dict(final_logit_softcapping=30.)), ('granite', dict(logits_scaling=8.)),
                                        ('cohere', dict(logit_scale=.5))])
def test_a_model_that_does_more_than_its_configuration_says_is_refused(kind, said, tmp_path, monkeypatch):
    model = tiny(kind, **said)
    stored(tmp_path/'model', model)
    linear_head(model).save_pretrained(tmp_path/'head')
    plain = type(model).forward
    def more(self, *args, **kw): out = plain(self, *args, **kw); out.logits = out.logits.sin(); return out
    monkeypatch.setattr(type(model), 'forward', more)
    with pytest.raises(ValueError, match='in a way that its configuration does not name'):
        fold(tmp_path/'head', tmp_path/'model', tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_a_change_that_no_configuration_names_is_refused(tmp_path, monkeypatch):
    model = tiny('llama')
    stored(tmp_path/'model', model)
    linear_head(model).save_pretrained(tmp_path/'head')
    plain = type(model).forward
    def more(self, *args, **kw): out = plain(self, *args, **kw); out.logits = out.logits*2; return out
    monkeypatch.setattr(type(model), 'forward', more)
    with pytest.raises(ValueError, match='changes its logits after the output embedding'):
        fold(tmp_path/'head', tmp_path/'model', tmp_path/'out')


def in_double(head):
    "The same head in float64, free to learn"
    head = copy.deepcopy(head).double()
    for p in head.parameters(): p.requires_grad_(True)
    return head


@pytest.mark.parametrize('by', ['token', 'prompt'])
@pytest.mark.parametrize('reads, width', [('hidden', 0), ('hidden', 4), ('logits', 4), ('both', 4)])
def test_the_gradient_of_a_head_is_that_of_finite_differences(reads, width, by):
    torch.manual_seed(0)
    head = in_double(TemperatureHead(32, reads=reads, width=width, by=by))
    with torch.no_grad(): head.net[-1].weight.mul_(.3)
    hidden, z = torch.randn(2, 5, 32).double(), 3*torch.randn(2, 5, 300).double()
    ids = z.topk(2).indices[..., 1] # the second most likely, which min-p keeps
    loss = lambda: head_logprobs(hidden, z, ids, head, scale=1.7)[0].sum()
    loss().backward()
    T = head_logprobs(hidden, z, ids, head)[1]
    assert T.shape == (2, 5 if by == 'token' else 1) and T.std() > 1e-3 and head.t_min < T.min() and T.max() < head.t_max
    assert torch.isfinite(loss()), 'a token that is cut has no gradient'
    for p in head.parameters():
        flat = p.data.view(-1)
        for i in range(0, len(flat), 7):
            eps, kept = 1e-6, flat[i].item()
            flat[i] = kept + eps; up = loss().item()
            flat[i] = kept - eps; down = loss().item()
            flat[i] = kept
            wanted = (up - down)/(2*eps)
            assert p.grad.view(-1)[i].item() == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    assert sum(p.grad.abs().sum() for p in head.parameters()) > .1


def test_a_head_that_is_attached_scores_what_it_sampled_with_a_ratio_of_one():
    model = tiny('llama')
    head = linear_head(model)
    kw = MASK | dict(max_new_tokens=20, output_scores=True, return_dict_in_generate=True)
    torch.manual_seed(0)
    with attach(model, head, scale=1.5): out = model.generate(IDS, **sampling(head), **kw)
    new = out.sequences[:, IDS.shape[1]:]
    wrote = torch.stack(out.scores, 1).log_softmax(-1).gather(-1, new[..., None])[..., 0]
    with torch.no_grad(): hidden, z, _ = read_output(model, lambda h: h[0, IDS.shape[1] - 1:-1], input_ids=out.sequences)
    scored, T = head_logprobs(hidden[None], z[None], new, head, scale=1.5)
    assert new.numel() > 3 and T.std() > .1 and (scored - wrote).expm1().abs().max() < 1e-4


def test_a_step_along_the_gradient_makes_a_token_likelier_and_touches_no_model():
    model = tiny('llama').requires_grad_(False)
    head = linear_head(model)
    hidden, z, _ = read_output(model, lambda h: h[0], input_ids=IDS)
    ids = z.argmax(-1)[None]
    before = head_logprobs(hidden[None], z[None], ids, head)[0].sum()
    before.backward()
    with torch.no_grad():
        for p in head.parameters(): p.add_(p.grad, alpha=1e-3)
    assert head_logprobs(hidden[None], z[None], ids, head)[0].sum() > before and all(p.grad is None for p in model.parameters())


def test_a_tokenizer_that_knows_no_english(tmp_path):
    model = tiny('qwen2')
    stored(tmp_path/'model', model)
    linear_head(model).save_pretrained(tmp_path/'head')
    with pytest.raises(ValueError, match='makes no tokens'): fold(tmp_path/'head', tmp_path/'model', tmp_path/'out')
    assert not (tmp_path/'out').exists()


def test_a_bias_beside_the_matrix(tmp_path):
    model = tiny('phi')
    stored(tmp_path/'model', model)
    linear_head(model).save_pretrained(tmp_path/'head')
    with pytest.raises(ValueError, match='has a bias beside it'): fold(tmp_path/'head', tmp_path/'model', tmp_path/'out')
