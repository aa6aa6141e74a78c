"Variety of meaning, and likelihood under another model; the real encoder where `make meaning` has been run"
import gzip, importlib.util, json, math, sys

import numpy as np, pandas as pd, pytest, torch
from conftest import ROOT
from transformers import BertConfig, BertModel

from simpledeco.model import load_model
from simpledeco.study.meaning import apart, embedded, likely, load_encoder, PACKAGE
from simpledeco.study.models import model_folder

sys.path.insert(0, str(ROOT/'benchmarks'))
import meaning

TEXTS = ['Lima', 'the capital of Peru is Lima', 'a lighthouse in the fog', 'Behind the old house stood a wall.']
ASK = [dict(role='user', content='What is the capital of Peru?')]
there = importlib.util.find_spec(PACKAGE) is not None


@pytest.fixture(scope='module')
def smoke(): return load_model(model_folder('smoke', ROOT))


@pytest.fixture(scope='module')
def encoder(smoke):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return BertModel(BertConfig(vocab_size=len(smoke[1]), **sizes)).eval(), smoke[1]


def test_an_embedding_is_the_mean_of_the_texts_own_tokens(encoder):
    "One text at a time, without padding, in float64"
    model, tokenizer = encoder
    for found,text in zip(embedded(encoder, TEXTS).double().numpy(), TEXTS):
        with torch.no_grad(): h = model(**tokenizer([text], return_tensors='pt')).last_hidden_state[0].double().numpy().mean(0)
        assert np.allclose(found, h/np.sqrt((h*h).sum()), atol=1e-5)


def test_apart_is_one_minus_the_cosine_over_all_pairs(encoder):
    e = embedded(encoder, TEXTS).double().numpy()
    pairs = [1 - e[i] @ e[j] for i in range(4) for j in range(i)]
    assert len(pairs) == 6 and math.isclose(apart(encoder, TEXTS), np.mean(pairs), rel_tol=1e-4)
    assert apart(encoder, TEXTS[:1]*4) == 0 and math.isnan(apart(encoder, TEXTS[:1]))
    assert math.isclose(apart(encoder, TEXTS[::-1]), apart(encoder, TEXTS), rel_tol=1e-5)


def test_nats_are_the_loss_of_transformers(smoke):
    "Of the text alone: neither the prompt nor the end counts, nor a space around the text, nor the other texts"
    model, tokenizer = smoke
    prompt = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
    alone = []
    for text in TEXTS:
        a, b = (tokenizer(x, add_special_tokens=False, return_tensors='pt').input_ids for x in (prompt, text))
        with torch.no_grad(): alone.append(model(torch.cat([a, b], 1), labels=torch.cat([0*a - 100, b], 1)).loss.item())
    found = likely(model, tokenizer, ASK, [f' {TEXTS[0]}\n', '  ', *TEXTS[1:]])
    assert math.isnan(found[1]) and np.allclose(found[:1] + found[2:], alone, atol=1e-5)


def frame_of(good, varied, seen): # two decoders at three strengths, on four clusters
    rows = [dict(task='further', decoder=d, strength=s, seed=0, cluster=f'place {c}', prompt=c,
                 good=good(d, s), varied=varied(s), meaning=seen(d, s), nats=s)
            for d in ('by token', 'by prompt', 'static, min-p') for s in (.4, .7, 1., 1.6, 2.) for c in range(4)]
    return pd.DataFrame(rows)


def test_what_is_bought_with_words_alone_is_no_gain_in_meaning():
    "By token is as good, hotter by a half at each strength in words; in meaning it is its rival at half the strength"
    frame = frame_of(good=lambda d, s: 1 - s/4 + .1*(d == 'by token'), varied=lambda s: s/2,
                     seen=lambda d, s: (s - .4*(d == 'by token'))/4)
    found = meaning.gains(frame, bootstrap=20).set_index(['quality', 'by', 'at', 'decoder', 'rival'])
    gain = lambda quality, by, rival: found.loc[(quality, by, 'T = 1', 'by token', rival), 'gain']
    assert math.isclose(gain('good', 'varied', 'by prompt'), .1, abs_tol=1e-9)
    assert math.isclose(gain('good', 'meaning', 'by prompt'), 0, abs_tol=1e-9)
    assert math.isclose(gain('likely', 'meaning', 'static, min-p'), -.4, abs_tol=1e-9)
    assert math.isclose(found.loc[('good', 'meaning', 'T = 1', 'by prompt', 'static, min-p'), 'gain'], 0, abs_tol=1e-9)


def kept(folder, texts):
    frame = frame_of(lambda d, s: .5, lambda s: s, lambda d, s: s).drop(columns=['meaning', 'nats'])
    frame.to_csv(folder/'further-0.csv', index=False)
    with gzip.open(folder/'further-0.jsonl.gz', 'wt', encoding='utf-8') as f:
        f.writelines(json.dumps(dict(x, texts=texts)) + '\n' for x in frame[meaning.KEY].to_dict('records'))
    return frame


def test_texts_are_read_beside_their_scores(tmp_path, smoke, encoder):
    made = kept(tmp_path, TEXTS)
    frame = meaning.kept(tmp_path)
    assert len(frame) == len(made) and frame.texts.map(lambda x: x == TEXTS).all()
    tasks = dict(further=[dict(messages=ASK, group=f'place {c}', corpus='inside') for c in range(4)])
    some = meaning.checked(frame, tasks)[:3]
    found = meaning.read(some, tasks, encoder, smoke)
    assert np.allclose(found.meaning, apart(encoder, TEXTS)) and 'nats' not in meaning.read(some, tasks, encoder)
    assert np.allclose(found.nats, np.mean(likely(*smoke, ASK, TEXTS[:meaning.EACH])))


def test_what_does_not_belong_together_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match='no texts in .*: run `make'): meaning.kept(tmp_path)
    kept(tmp_path, TEXTS)
    with (tmp_path/'further-0.csv').open('a') as f: f.write('further,by token,9.0,0,0,0,1,1\n')
    with pytest.raises(ValueError, match='lacks texts of scores in the CSV beside it'): meaning.kept(tmp_path)
    kept(tmp_path, TEXTS)
    other = dict(further=[dict(messages=ASK, group=f'place {c + 1}', corpus='inside') for c in range(4)])
    with pytest.raises(ValueError, match='further: the texts answer other prompts'): meaning.checked(meaning.kept(tmp_path), other)


def test_each_model_is_read_by_the_other():
    for a,b in (('rungs', 'gemma'), ('rungs-further', 'gemma-further')): assert (meaning.other_of(a), meaning.other_of(b)) == (b, a)


@pytest.mark.skipif(there, reason='the encoder is installed')
def test_an_encoder_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match='all_minilm_l6_v2 is not installed: run `make meaning`'): load_encoder()


PARAPHRASES = [
    ('The city lies on the sea.', 'The town is on the coast.'), ('Lima is the capital of Peru.', "Peru's capital is Lima."),
    ('It rained all day.', 'Rain fell from morning to night.'), ('She plays the piano well.', 'She is a good pianist.'),
    ('The train was late.', 'The train did not arrive on time.'), ('He bought a cheap car.', 'He paid little for the vehicle.'),
    ('The cat sleeps on the sofa.', 'A cat is asleep on the couch.'),
    ('I am writing from the mountains.', 'I send you this from the hills.'),
    ('The soup is too salty.', 'There is too much salt in the soup.'),
    ('The museum closes at five.', 'You cannot visit the museum after five.')]


@pytest.mark.skipif(not there, reason='no sentence encoder: run `make meaning`')
def test_the_real_encoder_knows_what_says_the_same():
    "Each text is nearer to its paraphrase than to any paraphrase of the others"
    encoder, (left, right) = load_encoder(), map(list, zip(*PARAPHRASES))
    cosine = embedded(encoder, left) @ embedded(encoder, right).T
    assert cosine.argmax(0).tolist() == cosine.argmax(1).tolist() == list(range(10))
    same, other = (np.mean([apart(encoder, [a, b]) for a,b in zip(left, r)]) for r in (right, right[3:] + right[:3]))
    assert 0 < same < other/2 and apart(encoder, left[:1]*4) < 1e-6
