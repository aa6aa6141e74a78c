"""The text is what the model said: small tokenizers and chat templates in the style of many
families, each with the ids and the response that are right"""
import json, threading
from datetime import date, datetime
from types import SimpleNamespace

import pytest, torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from simpledeco import conversations
from simpledeco.conversations import encode, encoder, end_tokens, prompt_ids
from simpledeco.onpolicy import judge, on_policy, useful_gap
from simpledeco.sample import Answer, constant, sample
from simpledeco.scan import scan
from simpledeco.vllm import ends_of, write

MARKS = ['<s>', '</s>', '<sot>', '<eot>', '[INST]', '[/INST]', '<think>', '</think>', '<|user|>',
         '<|assistant|>', '<|system|>']
SPLIT = {'bytes': pre_tokenizers.ByteLevel(add_prefix_space=False),
         'prefix': pre_tokenizers.ByteLevel(add_prefix_space=True),
         'first': pre_tokenizers.Metaspace(prepend_scheme='first'),
         'always': pre_tokenizers.Metaspace(prepend_scheme='always')}
WORDS = ['ok', 'hi', 'no', 'say', 'it', 'user', 'assistant', 'system', 'be', 'brief', 'wait',
         'Answer', 'Question', 'is', 'yes']


def vocabulary(kind):
    "Every character, some words with and without the space before them, and glued white space"
    space, line = ('Ġ', 'Ċ') if kind in ('bytes', 'prefix') else ('▁', '\n')
    chars = (sorted(pre_tokenizers.ByteLevel.alphabet())
             if space == 'Ġ' else [chr(i) for i in range(33, 127)] + [space, line])
    pieces, merges = list(dict.fromkeys([*chars, space])), []
    for word in [space + line, line + line, space*2, line + space, line + space*2,
                 *[w for x in WORDS for w in (x, space + x)]]:
        for n in range(2, len(word) + 1):
            if word[:n] not in pieces: pieces.append(word[:n]); merges.append((word[:n-1], word[n-1]))
    return {p: i for i,p in enumerate(pieces)}, merges


def tokenizer_of(template, kind='bytes', eos='</s>', rstrip=()):
    "A tokenizer of some hundred tokens"
    vocab, merges = vocabulary(kind)
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = SPLIT[kind]
    core.decoder = (decoders.ByteLevel() if kind in ('bytes', 'prefix')
                    else decoders.Metaspace(prepend_scheme=SPLIT[kind].prepend_scheme))
    core.add_special_tokens([AddedToken(m, special=True, normalized=False, rstrip=m in rstrip)
                             for m in MARKS])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token='<s>')
    made.chat_template = template
    return made


def talk(*texts, system=None):
    turns = [dict(role=('user', 'assistant')[i % 2], content=t) for i,t in enumerate(texts)]
    return ([dict(role='system', content=system)] if system else []) + turns


def example(messages, n=0):
    return dict(id=f'x{n}', corpus='c', split='train', group=f'g{n}', messages=messages)


def read(tokenizer, messages, ends=('<eot>',), **kw):
    "Ids, and the response tokens as text"
    ids, where = encode(example(messages), tokenizer, 999,
                        sorted({*tokenizer.convert_tokens_to_ids(list(ends)),
                                tokenizer.eos_token_id}), **kw)
    return ids, [tokenizer.decode([ids[i]]) for i in where], where


def whole(tokenizer, messages, n): return tokenizer.apply_chat_template(messages).input_ids[:n]
def model_of(tokenizer, eos=None, **kw):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
                         num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=512,
                         eos_token_id=eos, **kw)
    return LlamaForCausalLM(config).eval()


PLAIN = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eot>{{ '\\n' }}{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>{% endif %}")
DOUBLE = PLAIN.replace("<eot>{{ '\\n' }}", '<eot></s>')
SYSTEM_NO = ("{% for m in messages %}{% if m.role == 'system' %}"
             "{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}" + PLAIN)
DATED = "<|system|>Today is {{ strftime_now('%d %b %Y') }}<eot>" + PLAIN
# and the rendered answer has no thought
OPENS = PLAIN.replace('%}<|assistant|>{%', '%}<|assistant|><think>\n{%')
LOOPS = (PLAIN + '{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}'
         '{% endfor %}{% endfor %}{% endfor %}')
STRIPS = ("{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}"
          "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<eot>\n"
          "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


# where an answer ends

@pytest.mark.parametrize('named, own, right', [([7, 5], 2, [2, 5, 7]), (7, 7, [7]), (None, 2, [2]),
                                               (7, None, [7]), ((4,), None, [4])])
def test_ends_are_all_of_the_generation_configuration_and_the_tokenizer(named, own, right):
    config = GenerationConfig(eos_token_id=named)
    model, tokenizer = SimpleNamespace(generation_config=config), SimpleNamespace(eos_token_id=own)
    assert end_tokens(config, tokenizer) == end_tokens(model, tokenizer) == right


def forced(tokenizer, text):
    """A model that says a text, whatever it is asked: its logits depend on the position since the
    prompt's last token"""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    def rule(step):
        said = step.state.setdefault('n', 0)
        step.state['n'] += 1
        now = torch.tensor([ids[min(said, len(ids) - 1)]])
        return torch.full_like(step.logits, -torch.inf).index_fill(1, now, 0.)
    return rule


def test_an_answer_ends_where_generate_ends():
    """The end of a turn is in the generation configuration alone: nothing is invented after it, it
    is judged without, and counts as ended"""
    tokenizer = tokenizer_of(PLAIN)
    end = tokenizer.convert_tokens_to_ids('<eot>')
    model = model_of(tokenizer, eos=[end])
    answer = sample(model, tokenizer, [talk('hi')], dict(x=forced(tokenizer, 'no<eot><|user|>5555')),
                    1, 9, progress=False)['x'][0][0]
    assert tokenizer.decode(answer.tokens) == 'no<eot>'
    [found] = judge(tokenizer, [dict(example(talk('hi')), answer='no')], [[answer]],
                    end_tokens(model, tokenizer))
    assert found['ended'] and found['right'] and found['messages'][-1]['content'] == 'no'


class Engine:
    "What `write` sees of vLLM: it stops at the tokens that it is told, as the real one does"
    def __init__(self, named, tokens):
        self.tokens = tokens
        self.llm_engine = SimpleNamespace(
            model_config=SimpleNamespace(try_get_generation_config=lambda: dict(eos_token_id=named)))
    def generate(self, prompts, params):
        self.prompts = [p['prompt_token_ids'] for p in prompts]
        out = []
        for p in params:
            stop = next((i for i,t in enumerate(self.tokens) if t in p.stop_token_ids),
                        len(self.tokens))
            said = self.tokens[:stop + 1][:p.max_tokens]
            answer = SimpleNamespace(index=0, token_ids=said, cumulative_logprob=-1.)
            out.append(SimpleNamespace(outputs=[answer]))
        return out


@pytest.mark.parametrize('most, ended', [(9, True), (1, False)])
def test_vllm_stops_at_every_end_and_its_answers_are_judged_by_the_same(monkeypatch, most, ended):
    monkeypatch.setitem(__import__('sys').modules, 'vllm',
                        SimpleNamespace(SamplingParams=lambda **kw: SimpleNamespace(**kw)))
    tokenizer = tokenizer_of(PLAIN)
    end = tokenizer.convert_tokens_to_ids('<eot>')
    engine = Engine([end], tokenizer('no<eot><|user|>55').input_ids)
    answers = write(engine, tokenizer, [talk('hi')], 1, most)
    assert ends_of(engine, tokenizer) == sorted([end, tokenizer.eos_token_id])
    assert engine.prompts == prompt_ids(tokenizer, [talk('hi')])
    [found] = judge(tokenizer, [dict(example(talk('hi')), answer='no')], answers,
                    ends_of(engine, tokenizer))
    assert found['ended'] == ended and found['messages'][-1]['content'] == 'no'
    assert found['ids'] == engine.prompts[0] + answers[0][0].tokens


# which tokens are the response

@pytest.mark.parametrize('template', [PLAIN, DOUBLE, PLAIN.replace("'\\n'", "'\\n\\n'"),
                                      PLAIN.replace("{{ '\\n' }}", "</s>{{ '\\n' }}")])
def test_what_a_template_writes_behind_the_end_is_not_response(template):
    tokenizer = tokenizer_of(template)
    ids, said, where = read(tokenizer, talk('hi', 'ok', 'say', 'no'))
    assert said == ['ok', '<eot>', 'no', '<eot>']
    assert ids == whole(tokenizer, talk('hi', 'ok', 'say', 'no'), len(ids))
    assert where[-1] == len(ids) - 1


@pytest.mark.parametrize('kind', list(SPLIT))
@pytest.mark.parametrize('template', [PLAIN, PLAIN.replace('|>{{ m', '|>:{{ m').replace(
    '<|assistant|>{%', '<|assistant|>:{%'), '<s>' + PLAIN])
def test_ids_are_those_of_the_whole_conversation(kind, template):
    tokenizer = tokenizer_of(template, kind)
    messages = talk('hi', 'ok it is', 'say it', 'no', system='be brief')
    ids, said, where = read(tokenizer, messages)
    assert ids == whole(tokenizer, messages, len(ids))
    assert ''.join(said).replace(' ', '') == 'okitis<eot>no<eot>'
    assert ids[:where[0]] == prompt_ids(tokenizer, [messages[:2]])[0]


@pytest.mark.parametrize('kind', list(SPLIT))
def test_no_answer_begins_with_a_token_that_nobody_says(kind):
    "Turns between marks of plain text: the prompt ends in a colon, and the answer is its continuation"
    template = ("{% for m in messages %}{{ m.role }}:{{ m.content }}"
                "{% if m.role == 'assistant' %}<eot>{% endif %}\n{% endfor %}"
                "{% if add_generation_prompt %}assistant:{% endif %}")
    tokenizer, messages = tokenizer_of(template, kind), talk('hi', 'ok', 'say', 'no')
    ids, said, _ = read(tokenizer, messages)
    assert ids == whole(tokenizer, messages, len(ids)) and said == ['ok', '<eot>', 'no', '<eot>']


@pytest.mark.parametrize('kind', list(SPLIT))
@pytest.mark.parametrize('prompt, answer',
                         [('\\n', ' it'), ('\\n', '\nit'), (' ', 'ok'), (' ', ' ok'), ('', ' ok')])
def test_a_token_that_straddles_the_border_is_cut_where_the_prompt_ends(kind, prompt, answer):
    template = ("{% for m in messages %}{{ m.role }}:P{{ m.content }}<eot>\n{% endfor %}"
                "{% if add_generation_prompt %}assistant:P{% endif %}".replace('P', '{{ "' + prompt + '" }}'))
    tokenizer, messages = tokenizer_of(template, kind), talk('hi', answer, 'say', 'no')
    ids, said, where = read(tokenizer, messages)
    asked = prompt_ids(tokenizer, [messages[:1]])[0]
    plain = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert ids[:len(asked)] == asked and where[0] == len(asked)
    assert plain(ids) == plain(whole(tokenizer, messages, 10**6)[:-1]).removesuffix('\n')
    assert said[-2:] == ['no', '<eot>'] or (prompt == ' ' and said[-1] == '<eot>')


def test_the_opening_words_of_an_assistant_are_context():
    tokenizer = tokenizer_of(PLAIN)
    messages = [dict(role='assistant', content='hi'), *talk('say', 'ok')]
    assert read(tokenizer, messages)[1] == ['ok', '<eot>']
    with pytest.raises(ValueError, match='example x0 has no assistant turn'):
        read(tokenizer, messages[:2])


def test_an_answer_that_nothing_ends_is_refused_with_what_helps():
    tokenizer = tokenizer_of(PLAIN.replace('<eot>', ''))
    with pytest.raises(ValueError,
                       match='example x0 .* no token that ends a generation: set eos_token_id'):
        read(tokenizer, talk('hi', 'ok'))


# thoughts

def test_a_generation_prompt_that_opens_a_thought_is_refused_with_what_helps():
    with pytest.raises(ValueError, match=r"drops '<think>\\n'.*let the model answer itself"):
        read(tokenizer_of(OPENS), talk('hi', 'ok'))


def test_earlier_thoughts_that_a_template_strips_are_context_and_the_last_answer_is_used():
    tokenizer = tokenizer_of(STRIPS)
    messages = talk('hi', '<think>wait</think>ok', 'say', '<think>it</think>no')
    ids, said, _ = read(tokenizer, messages)
    assert said == ['<think>', 'it', '</think>', 'no', '<eot>']
    assert ids == whole(tokenizer, messages, len(ids))
    assert 'wait' not in tokenizer.decode(ids)
    # nothing to strip: both were said
    assert read(tokenizer, talk('hi', 'ok', 'say', 'no'))[1] == ['ok', '<eot>', 'no', '<eot>']


def test_an_empty_thought_that_the_template_writes_is_not_response():
    closed = (
        "{% if enable_thinking is defined and not enable_thinking %}<think>\\n\\n</think>\\n\\n{% endif %}")
    template = PLAIN.replace('|>{{ m.content }}', "|>"
                             "{% if m.role == 'assistant' and '<think>' not in m.content %}<think>\n\n</think>\n\n"
                             "{% endif %}{{ m.content }}")
    template = template.replace('%}<|assistant|>{%',
                                '%}<|assistant|>' + closed.replace('\\n', '\n') + '{%')
    tokenizer = tokenizer_of(template)
    assert read(tokenizer, talk('hi', 'ok'))[1] == ['ok', '<eot>']
    # this one was said
    assert read(tokenizer,
                talk('hi', '<think>it</think>no'))[1] == ['<think>', 'it', '</think>', 'no', '<eot>']


# what a template may do: print the date, refuse, not end

class Clock(datetime):
    day = date(2026, 1, 31)
    @classmethod
    def now(cls, tz=None): return datetime.combine(cls.day, datetime.min.time())


@pytest.fixture
def clock(monkeypatch):
    class Today(date):
        @classmethod
        def today(cls): return Clock.day
    monkeypatch.setattr('transformers.utils.chat_template_utils.datetime', Clock)
    monkeypatch.setattr('simpledeco.scan.date', Today)
    monkeypatch.setattr(Clock, 'day', date(2026, 1, 31))
    return Clock


@pytest.mark.parametrize('form', ['%d %b %Y', '%-d %B %y', '%Y-%m-%d', '%A, %j'])
def test_a_day_that_is_given_is_printed_as_the_clock_would(clock, form):
    tokenizer = tokenizer_of(DATED.replace('%d %b %Y', form))
    today = prompt_ids(tokenizer, [talk('hi')])
    assert date(2026, 1, 31).strftime(form) in tokenizer.decode(today[0])
    clock.day = date(2026, 2, 1)
    assert prompt_ids(tokenizer,
                      [talk('hi')]) != today == prompt_ids(tokenizer, [talk('hi')], date(2026, 1, 31))


def test_a_scan_goes_on_with_the_day_on_which_it_began(clock, tmp_path):
    tokenizer = tokenizer_of(DATED, eos='<eot>')
    model, examples = model_of(tokenizer), [example(talk('hi', 'ok'), n) for n in range(4)]
    table = scan(model, tokenizer, examples, tmp_path/'t', shard_examples=2, progress=False)
    before = {p.name: p.read_bytes() for p in (tmp_path/'t').iterdir()}
    assert table.info['day'] == '2026-01-31'
    (tmp_path/'t/shard-00001.safetensors').unlink()
    clock.day = date(2026, 2, 1)
    scan(model, tokenizer, examples, tmp_path/'t', shard_examples=2, progress=False)
    assert {p.name: p.read_bytes() for p in (tmp_path/'t').iterdir()} == before
    assert 'day' not in scan(model, tokenizer_of(PLAIN, eos='<eot>'), examples, tmp_path/'plain',
                             progress=False).info


def test_a_template_that_refuses_a_system_turn_is_one_line(tmp_path):
    tokenizer, messages = tokenizer_of(SYSTEM_NO, eos='<eot>'), talk('hi', 'ok', system='be brief')
    model = model_of(tokenizer)
    prompt = dict(example(messages[:2]), answer=None)
    for action in (lambda: scan(model, tokenizer, [example(messages)], tmp_path/'t', progress=False),
                   lambda: encode(example(messages), tokenizer, 99),
                   lambda: on_policy(model, tokenizer, [prompt], progress=False),
                   lambda: prompt_ids(tokenizer, [messages[:2]])):
        refused = '(example x0|prompt 1) cannot be tokenised .*System role not supported'
        with pytest.raises(ValueError, match=refused) as e: action()
        assert '\n' not in str(e.value)
    assert not (tmp_path/'t').exists()


@pytest.mark.parametrize('broken', ['{{ 1/0 }}', '{{ nothing.at.all }}', "{{ 'a' + 1 }}",
                                    '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
                                    "{{ 'a'*10**15 }}", '{% if %}'])
def test_whatever_a_template_raises_is_named(broken):
    with pytest.raises(ValueError,
                       match='example x0 cannot be tokenised .the chat template refuses it: '):
        read(tokenizer_of(PLAIN + broken), talk('hi', 'ok'))


def test_a_template_that_does_not_end_is_stopped(monkeypatch, tmp_path):
    monkeypatch.setattr(conversations, 'SECONDS', .2)
    tokenizer = tokenizer_of(LOOPS, eos='<eot>')
    with pytest.raises(ValueError, match='did not end within 0.2 seconds'):
        scan(model_of(tokenizer), tokenizer, [example(talk('hi', 'ok'))], tmp_path/'t', progress=False)
    with pytest.raises(ValueError, match='prompt 1 .*did not end within'):
        prompt_ids(tokenizer, [talk('hi')])


def test_outside_the_main_thread_conversations_are_tokenised_as_well():
    tokenizer, out = tokenizer_of(PLAIN), []
    thread = threading.Thread(target=lambda: out.append(read(tokenizer, talk('hi', 'ok'))[1]))
    thread.start(); thread.join()
    assert out == [['ok', '<eot>']]


# the ids that were sampled

def test_judged_answers_keep_their_ids(tmp_path):
    """The same text in other tokens than the tokenizer would choose, through a template that trims:
    the table has what was sampled, and a cut answer has no end"""
    tokenizer = tokenizer_of(PLAIN.replace('{{ m.content }}', '{{ m.content|trim }}'), eos='<eot>')
    model, end = model_of(tokenizer), tokenizer.eos_token_id
    i, t, space = (tokenizer.convert_tokens_to_ids(x) for x in ('i', 't', 'Ġ'))
    answers = [[Answer([space, i, t, end], 1.), Answer([i, t, space], 1.), Answer([end], 1.)]]
    found = judge(tokenizer, [dict(example(talk('say')), answer='it')], answers, [end])
    assert [x['right'] for x in found] == [True, True, False]
    assert [x['ended'] for x in found] == [True, False, True]
    found = json.loads(json.dumps(found))
    table = scan(model, tokenizer, found, tmp_path/'t', progress=False)
    assert table['label'].tolist() == [space, i, t, end, i, t, space, end]
    asked = prompt_ids(tokenizer, [talk('say')])[0]
    z = model(torch.tensor([asked + [space, i, t, end]])).logits[0, len(asked) - 1:-1]
    torch.testing.assert_close(table['z_true'][:4],
                               z.gather(1, torch.tensor([[space], [i], [t], [end]]))[:, 0].detach(),
                               atol=1e-4, rtol=1e-4)
    assert (useful_gap(table, found)[7:] == 0).all()


def test_an_answer_that_begins_in_a_thought_is_kept_as_it_was_said(tmp_path):
    tokenizer = tokenizer_of(OPENS, eos='<eot>')
    examples = on_policy(model_of(tokenizer), tokenizer, [dict(example(talk('hi')), answer=None)],
                         3, 5, progress=False)
    table = scan(model_of(tokenizer), tokenizer, examples, tmp_path/'t', progress=False)
    assert table['label'].tolist() == [i for x in examples for i in x['ids'][x['where'][0]:]]
    assert all(tokenizer.decode(x['ids'][:x['where'][0]]).endswith('<think>\n') for x in examples)


@pytest.mark.parametrize('wrong', [dict(ids=[5, 6]), dict(ids=[5, 6], where=[0]),
                                   dict(ids=[5, 6], where=[1, 1]), dict(ids=[5, 6], where=[2]),
                                   dict(ids=[5, 10**6], where=[1]), dict(ids=[5, True], where=[1])])
def test_ids_that_cannot_be_are_refused(wrong):
    tokenizer = tokenizer_of(PLAIN, eos='<eot>')
    with pytest.raises(ValueError, match='example x0'):
        encoder(model_of(tokenizer), tokenizer, None)(example(talk('hi', 'ok')) | wrong)


# ten templates in the style of the popular families, all through the same questions

FAMILIES = {
    'marks and a line break': PLAIN,
    'instruction in brackets': "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{{ m.content }} [/INST]{% else %} {{ m.content|trim }} </s>{% endif %}{% endfor %}",
    'instruction, no spaces': "<s>{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
    'header and two line breaks': "<s>{% for m in messages %}<sot>{{ m.role }}\n\n"
    "{{ m.content|trim }}<eot>{% endfor %}{% if add_generation_prompt %}<sot>assistant\n\n"
    "{% endif %}",
    'turns of a model': "<s>{% for m in messages %}<sot>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content|trim }}<eot>\n{% endfor %}"
    "{% if add_generation_prompt %}<sot>model\n{% endif %}",
    'plain words': "{% for m in messages %}{{ m.role|upper }}: {{ m.content }}"
    "{{ '</s>' if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    'a line for each': "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    'headings': "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n"
    "{{ '<eot>\n' if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}",
    'end of the answers alone': "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{{ '<eot>' if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% endif %}",
    'another end for the last': "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{{ '</s>' if loop.last and m.role == 'assistant' else '<eot>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"}


@pytest.mark.parametrize('kind', list(SPLIT))
@pytest.mark.parametrize('family', list(FAMILIES))
def test_families(family, kind):
    """Ids of the whole; prompt and response side by side, as generation would see them; one end
    each, and the words of the last answer"""
    tokenizer, messages = tokenizer_of(FAMILIES[family], kind), talk('hi', 'ok it is', 'say it', 'no')
    ids, said, where = read(tokenizer, messages)
    asked, full = prompt_ids(tokenizer, [messages[:1], messages[:3]]), whole(tokenizer, messages, 10**6)
    plain = lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if all(full[:len(a)] == a for a in asked):
        assert ids == full[:len(ids)] # no token straddles a border
    last = where[max(i for i in range(len(where)) if i == 0 or where[i] != where[i-1] + 1):]
    assert ids[:last[0]][-3:] == asked[1][-3:] and plain(full).startswith(plain(ids))
    assert tokenizer.decode([ids[i] for i in last]).replace(' ', '').strip() in (
        'no<eot>', 'no</s>', 'no\n<eot>')
    assert sum(ids[i] in tokenizer.convert_tokens_to_ids(['<eot>', '</s>']) for i in last) == 1
    assert where[-1] == len(ids) - 1


def test_a_prompt_that_the_template_renders_otherwise_when_it_is_answered_is_refused():
    """The user's turn is closed only once it is not the last: no server would have asked what the
    whole conversation holds"""
    template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
                "{{ '<eot>' if not loop.last or m.role == 'assistant' }}{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    with pytest.raises(ValueError, match='example x0 .*no model would say this text there'):
        read(tokenizer_of(template), talk('hi', 'ok'))
