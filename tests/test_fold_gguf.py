"A linear head as a row of a GGUF file: what is written, and how transformers reads it; tests/test_llama.py runs it in llama.cpp"
from functools import cache
from types import SimpleNamespace

import numpy as np, pytest, torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

from simpledeco.fold_gguf import fold_gguf as fold, KEY, llama_sampling
from simpledeco.head import TemperatureHead
from simpledeco.model import fingerprint, read_output
from simpledeco.prepare import package_file, read_gguf
from simpledeco.study.settings import load_profile
from simpledeco.vllm import read_row

SMOL = package_file(load_profile('embedded').model.removeprefix('package:'))


V = 2048 # tokens are kept, as the Python that reads such files is slow


@cache
def fields():
    "{name: (value, types)} of SmolLM2's file, with the first tokens and the merges that make them"
    found = {name: (f.contents(), f.types) for name,f in GGUFReader(SMOL).fields.items()
             if not name.startswith('GGUF.') and name != 'general.architecture'}
    ggml = lambda name: f'tokenizer.ggml.{name}'
    tokens = set(found[ggml('tokens')][0][:V])
    short = {ggml(k): found[ggml(k)][0][:V] for k in ('tokens', 'token_type', 'scores') if ggml(k) in found}
    short[ggml('merges')] = [m for m in found[ggml('merges')][0] if {*m.split(' '), m.replace(' ', '', 1)} <= tokens]
    short |= {'llama.block_count': 2, 'llama.vocab_size': V}
    return {name: (short.get(name, value), types) for name,(value,types) in found.items()}


@cache
def weights(): return [t for t in GGUFReader(SMOL).tensors if not t.name.startswith('blk.') or int(t.name.split('.')[1]) < 2]


def as_it_is(name, data, kind): return {name: (data, kind)}


def cut(path, change=as_it_is, arch='llama', **replaced):
    "Two layers and the first tokens of SmolLM2; `change` may store a tensor otherwise, `replaced` are fields of the tokenizer"
    writer = GGUFWriter(path, arch)
    for name,(value,types) in fields().items():
        value = replaced.get(name.rpartition('.')[2], value)
        writer.add_key_value(name.replace('llama.', f'{arch}.'), value, types[0], types[-1] if types[0] == GGUFValueType.ARRAY else None)
    for t in weights():
        data = t.data[:V] if t.name == 'token_embd.weight' else t.data
        for name,(data,kind) in change(t.name, data, t.tensor_type).items(): writer.add_tensor(name, data, raw_dtype=kind)
    writer.add_key_length(64); writer.add_value_length(64)
    writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file(); writer.close()
    return path


def as_gemma2(name, data, kind):
    "SmolLM2's tensors as those of a Gemma 2, which has two norms more in a layer"
    other = name.replace('.attn_norm', '.post_attention_norm').replace('.ffn_norm', '.post_ffw_norm')
    return {name: (data, kind)} | ({} if other == name else {other: (data, kind)})


def stored_as(kind, untied=False):
    "The output matrix in another type"
    def change(name, data, old):
        if name != 'token_embd.weight': return {name: (data, old)}
        other = (quantize(dequantize(data, old), kind), kind)
        return {name: (data, old), 'output.weight': other} if untied else {name: other}
    return change


def head_for(model):
    torch.manual_seed(1)
    head = TemperatureHead(576, width=0, reads='hidden', base_model=fingerprint(model)).eval()
    head.mean, head.std = torch.randn(576)/4, torch.rand(576) + 2
    return head


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "(path, head, folder of the head) of two layers of SmolLM2"
    work = tmp_path_factory.mktemp('gguf')
    path = cut(work/'two.gguf')
    head = head_for(read_gguf(path)[0])
    head.save_pretrained(work/'head')
    return path, head, work/'head'


def tensors(path): return {t.name: t for t in GGUFReader(path).tensors}


def temperatures(path, ids):
    "Of a folded file, as transformers computes it: logits [n, V], T [n]"
    s = read_row(path)
    with torch.no_grad(): z = read_gguf(path)[0](ids).logits[0]
    return z, s['scale']*(z[:, s['row']] + s['b']).clamp(s['t_min'], s['t_max'])


IDS = torch.tensor([[504, 1575, 282, 1649, 314, 1042, 30, 1691, 253, 655, 28, 732, 1141]])
TYPES = GGMLQuantizationType


@pytest.mark.parametrize('kind, untied, exact, error', [
    (TYPES.Q8_0, False, True, .02), (TYPES.F32, False, True, 1e-5), (TYPES.F16, True, True, 2e-3), (TYPES.BF16, False, True, .02),
    (TYPES.Q4_1, False, False, .02), (TYPES.Q5_0, True, False, .02)])
def test_the_row_in_every_kind_of_matrix(kind, untied, exact, error, tmp_path):
    path = cut(tmp_path/'m.gguf', stored_as(kind, untied))
    model, _ = read_gguf(path)
    head = head_for(model)
    head.save_pretrained(tmp_path/'head')
    folded = fold(tmp_path/'head', path, tmp_path/'folded.gguf', scale=1.5)
    before, after, said = tensors(path), tensors(folded), read_row(folded)
    assert said['row'] == V and said['dtype'] == (kind.name if exact else 'Q8_0') and (said['others'] == 0) == exact
    output = 'output.weight' if untied or not exact else 'token_embd.weight'
    for name,old in before.items():
        new = after[name]
        if name == output and not exact: continue
        assert new.tensor_type == old.tensor_type and (new.data[:len(old.data)] == old.data).all(), name
    assert {k for k in after if k not in before} == (set() if untied or exact else {'output.weight'})
    assert len(after['token_embd.weight'].data) == len(after[output].data) == V + 1
    with torch.no_grad(): hidden, z, _ = read_output(model, lambda h: h[0], input_ids=IDS)
    found, T = temperatures(folded, IDS)
    wanted = 1.5*head.temperature(hidden)
    assert wanted.std() > .1 and (T - wanted).abs().max() < error
    if exact: assert torch.equal(found[:, :-1], z)
    else: assert 0 < (found[:, :-1] - z).abs().max() < 3*said['others'] + .05


@pytest.mark.parametrize('arch, change, message', [
    ('gemma2', as_gemma2, 'changes its logits after the output embedding'),
    ('granite', as_it_is, 'granite, is not one that transformers takes from GGUF')])
def test_models_that_change_their_logits(arch, change, message, made, tmp_path):
    path = cut(tmp_path/'m.gguf', change, arch)
    with pytest.raises(ValueError, match=message): fold(made[2], path, tmp_path/'x.gguf')
    assert not (tmp_path/'x.gguf').exists()


def test_the_vocabulary_is_as_long_as_the_matrix(made, tmp_path):
    path, head, folder = made
    written = GGUFReader(fold(folder, path, tmp_path/'x.gguf')).fields
    tokens, kinds = (written[f'tokenizer.ggml.{n}'].contents() for n in ('tokens', 'token_type'))
    assert len(tokens) == len(kinds) == written['llama.vocab_size'].contents() == V + 1
    assert tokens[-1] == '<|temperature|>' and kinds[-1] == 5 and tokens[:-1] == GGUFReader(path).fields['tokenizer.ggml.tokens'].contents()


def test_an_unused_token_is_taken_before_one_is_added(made, tmp_path):
    kinds = [5 if i == 2000 else kind for i,kind in enumerate(fields()['tokenizer.ggml.token_type'][0])]
    path = cut(tmp_path/'m.gguf', token_type=kinds)
    folded = fold(made[2], path, tmp_path/'x.gguf')
    assert read_row(folded)['row'] == 2000
    before, after = (tensors(p)['token_embd.weight'].data for p in (path, folded))
    assert len(before) == len(after) and (np.flatnonzero((before != after).any(1)) == [2000]).all()


def test_the_processor_of_llama_cpp(made, tmp_path):
    path, head, folder = made
    folded = fold(folder, path, tmp_path/'x.gguf')
    llm = SimpleNamespace(metadata={KEY: GGUFReader(folded).fields[KEY].contents()})
    asked = llama_sampling(llm, scale=2.)
    (read,), others = asked.pop('logits_processor'), asked
    assert others == dict(temperature=1.0, min_p=head.min_p, top_k=0, top_p=1.0, typical_p=1.0, repeat_penalty=1.0)
    z, T = temperatures(folded, IDS)
    for row,t in zip(z.numpy(), T.numpy()):
        kept = row.copy()
        found = read(IDS[0].numpy(), row)
        assert found.dtype == np.float32 and found[V] == -np.inf and (row == kept).all()
        np.testing.assert_allclose(found[:-1], row[:-1]/(2*t), rtol=1e-5)
    with pytest.raises(ValueError, match='has no row of a head'): llama_sampling(SimpleNamespace(metadata={}))
    with pytest.raises(ValueError, match='dict is no llama_cpp.Llama: an engine without logits processors'): llama_sampling({})


def test_a_file_folded_twice_a_name_that_is_taken_a_head_of_another_model(made, tmp_path):
    path, head, folder = made
    folded = fold(folder, path, tmp_path/'x.gguf')
    with pytest.raises(ValueError, match='has a row of a head already'): fold(folder, folded, tmp_path/'y.gguf')
    with pytest.raises(ValueError, match='exists: choose another'): fold(folder, path, folded)
    with pytest.raises(FileNotFoundError, match='there is no file'): fold(folder, tmp_path/'none.gguf', tmp_path/'y.gguf')
    other = TemperatureHead(576, width=0, reads='hidden', base_model='abc')
    other.save_pretrained(tmp_path/'other')
    with pytest.raises(ValueError, match='was trained for base model'): fold(tmp_path/'other', path, tmp_path/'y.gguf')
    assert read_row(fold(tmp_path/'other', path, tmp_path/'z.gguf', other_model=True))['base_model'] == 'abc'
    TemperatureHead(576, width=4, reads='hidden', base_model=head.base_model).save_pretrained(tmp_path/'deep')
    with pytest.raises(ValueError, match='only a linear head'): fold(tmp_path/'deep', path, tmp_path/'y.gguf')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['deep', 'other', 'x.gguf', 'z.gguf']


@pytest.mark.parametrize('row, message', [(17, 'which texts may use'), (2, 'which texts may use'), (V + 2, f'has {V} rows')])
def test_a_row_that_texts_use(row, message, made, tmp_path):
    with pytest.raises(ValueError, match=message): fold(made[2], made[0], tmp_path/'x.gguf', row=row)


def test_an_output_matrix_that_cannot_take_the_row(made, tmp_path):
    odd = (np.zeros((V, 576), np.int8), TYPES.I8)
    whole = lambda name, data, kind: {name: odd if name == 'token_embd.weight' else (data, kind)}
    with pytest.raises(ValueError, match='is I8, which cannot take a row'): fold(made[2], cut(tmp_path/'m.gguf', whole), tmp_path/'x.gguf')


def test_files_that_are_damaged(made, tmp_path):
    data = made[0].read_bytes()
    for name,content in dict(empty=b'', text=b'GGUF is a format', head=data[:40], half=data[:len(data)//2]).items():
        (tmp_path/f'{name}.gguf').write_bytes(content)
        with pytest.raises(ValueError, match='is damaged or no GGUF file|cannot read'):
            fold(made[2], tmp_path/f'{name}.gguf', tmp_path/'x.gguf')
    with pytest.raises(ValueError, match='neither output.weight nor token_embd.weight'):
        fold(made[2], cut(tmp_path/'m.gguf', lambda n, d, k: {} if n == 'token_embd.weight' else {n: (d, k)}), tmp_path/'x.gguf')
    with pytest.raises(ValueError, match='has a bias beside it'):
        bias = lambda n, d, k: {n: (d, k)} | ({'output.bias': (np.zeros(V, np.float32), TYPES.F32)} if n == 'token_embd.weight' else {})
        fold(made[2], cut(tmp_path/'b.gguf', bias), tmp_path/'x.gguf')
