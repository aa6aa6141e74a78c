"""Chat templates with a thinking part, on a real tokenizer: turns that are kept or stripped later, what is sampled, and how it is
judged. tests/test_text.py has the templates that are refused"""
from functools import cache

import pytest
from conftest import ROOT
from transformers import AutoTokenizer

from simpledeco.conversations import encode, prompt_ids
from simpledeco.onpolicy import judge
from simpledeco.sample import Answer

TURN = "<|im_start|>{{ m.role }}\n{{ said }}<|im_end|>\n"
LAST = ("{% set ns = namespace(last=-1) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}")
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n"
END = "{% endif %}"
EACH, ALSO, DONE = "{% for m in messages %}{% set said = m.content %}", "{% if m.role == 'assistant' %}", "{% endif %}"
STRIPPED = "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
TEMPLATES = dict(
    # as it is said, in every turn
    keeps=EACH + TURN + '{% endfor %}' + OPEN + END,
    # without the thinking where a user has spoken since; the answer that is asked for begins with it
    strips_earlier=LAST + EACH + ALSO + "{% if loop.index0 < ns.last %}" + STRIPPED + "{% endif %}" + DONE + TURN + '{% endfor %}'
        + OPEN + END,
    # the same, and where thinking is turned off an empty part is rendered in the last turn
    may_be_off=LAST + EACH + ALSO + "{% set rest = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '' %}"
        "{% set said = rest if loop.index0 < ns.last else '<think>\n' + thought + '\n</think>\n\n' + rest %}" + DONE + TURN + '{% endfor %}'
        + OPEN + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}" + END,
    # thinking is opened for the model, and dropped from every answer that is rendered
    opens_and_drops=EACH + ALSO + STRIPPED + DONE + TURN + '{% endfor %}' + OPEN + '<think>\n' + END)


@cache
def tokenizer_with(name):
    tokenizer = AutoTokenizer.from_pretrained(ROOT/'models/smoke')
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def thought(text, thinking='Let me see.'): return f'<think>\n{thinking}\n</think>\n\n{text}'


def talk(*texts): return [dict(role=('user', 'assistant')[i % 2], content=t) for i,t in enumerate(texts)]


def responses(name, messages):
    "The text of a conversation, and of its responses one after the other"
    tokenizer = tokenizer_with(name)
    ids, where = encode(dict(id='x', messages=messages), tokenizer, 10_000)
    runs, before = [], None
    for i in where:
        if before is None or i > before + 1: runs.append([])
        runs[-1].append(ids[i]); before = i
    return tokenizer.decode(ids), [tokenizer.decode(r) for r in runs]


ONE = talk('What is 17 + 25?', thought('It is 42.'))
TWO = talk('What is 17 + 25?', thought('It is 42.', 'First sum.'), 'And 1 more?', thought('It is 43.'))


@pytest.mark.parametrize('name', ['keeps', 'strips_earlier', 'may_be_off'])
def test_thinking_in_the_last_answer_is_part_of_the_response(name):
    "From the first token after the turn is opened to the end: the head learns before and after </think>"
    assert responses(name, ONE)[1] == [thought('It is 42.') + '<|im_end|>']


def test_a_template_that_keeps_thinking_has_every_turn_as_it_was_said():
    assert responses('keeps', TWO)[1] == [thought('It is 42.', 'First sum.') + '<|im_end|>', thought('It is 43.') + '<|im_end|>']


@pytest.mark.parametrize('name', ['strips_earlier', 'may_be_off'])
def test_a_turn_whose_thinking_is_stripped_later_is_context_and_not_a_response(name):
    "The model did not say the shorter turn there, and the longer one is not what it reads now"
    text, said = responses(name, TWO)
    assert said == [thought('It is 43.') + '<|im_end|>']
    assert 'First sum.' not in text and 'It is 42.<|im_end|>' in text


def test_an_earlier_turn_without_thinking_is_still_as_it_was_said():
    plain = talk('What is 17 + 25?', 'It is 42.', 'And 1 more?', thought('It is 43.'))
    assert responses('strips_earlier', plain)[1] == ['It is 42.<|im_end|>', thought('It is 43.') + '<|im_end|>']


@pytest.mark.parametrize('name', TEMPLATES)
def test_what_a_model_sampled_is_kept_as_it_is_under_every_template(name):
    "`answer` takes the ids of prompt and answer, so that no template rewrites them"
    tokenizer = tokenizer_with(name)
    user = talk('What is 17 + 25?')
    wrote = tokenizer('Let me see.\n</think>\n\nIt is 42.<|im_end|>', add_special_tokens=False).input_ids
    prompt = dict(id='p', corpus='sums', split='train', group='g', messages=user, answer='42', check='phrase')
    example, = judge(tokenizer, [prompt], [[Answer(wrote, 0.)]], [tokenizer.eos_token_id])
    asked = prompt_ids(tokenizer, [user])[0]
    ids, where = encode(example, tokenizer, 10_000)
    assert ids == asked + wrote and where == list(range(len(asked), len(asked) + len(wrote)))
    assert example['right'] and example['ended']


@pytest.mark.parametrize('name', ['strips_earlier', 'may_be_off'])
def test_a_prompt_with_an_earlier_turn_is_read_without_its_thinking(name):
    "As a server renders it, so that a head reads what it will read when it is used"
    read = tokenizer_with(name).decode(prompt_ids(tokenizer_with(name), [TWO[:3]])[0])
    assert 'First sum.' not in read and read.endswith('And 1 more?<|im_end|>\n<|im_start|>assistant\n')


@pytest.mark.parametrize('check, answer, right', [('number', '42', True), ('number', '41', False)])
def test_a_number_is_looked_for_at_the_end_and_so_behind_the_thinking(check, answer, right):
    tokenizer = tokenizer_with('strips_earlier')
    wrote = tokenizer(thought('It is 42.', 'Is it 41? No.') + '<|im_end|>', add_special_tokens=False).input_ids
    prompt = dict(id='p', corpus='sums', split='train', group='g', messages=talk('What is 17 + 25?'), answer=answer, check=check)
    assert judge(tokenizer, [prompt], [[Answer(wrote, 0.)]], [tokenizer.eos_token_id])[0]['right'] == right


@pytest.mark.parametrize('wrote, right', [
    (thought('It is Lyon.', 'Is it Paris? No.'), False), (thought('It is Paris.', 'Is it Lyon? No.'), True),
    ('<think>\nIs it Paris? Or', False), ('It is Paris.', True)])
def test_a_phrase_that_is_only_thought_of_is_no_right_answer(wrote, right):
    assert judged('strips_earlier', wrote)['right'] == right


@pytest.mark.parametrize('wrote, right', [
    ('Is it Paris? No.\n</think>\n\nIt is Lyon.', False), ('Lyon? No.\n</think>\n\nIt is Paris.', True), ('Is it Paris? Or', False)])
def test_thinking_that_the_template_opened_is_no_answer_either(wrote, right):
    example = judged('opens_and_drops', wrote)
    assert example['right'] == right and example['messages'][-1]['content'] == wrote


def judged(name, wrote):
    "An answer as an example, ended by the model"
    tokenizer = tokenizer_with(name)
    prompt = dict(id='p', corpus='facts', split='train', group='g', messages=talk('What is the capital of France?'), answer='Paris',
                  check='phrase')
    ids = tokenizer(wrote + '<|im_end|>', add_special_tokens=False).input_ids
    return judge(tokenizer, [prompt], [[Answer(ids, 0.)]], [tokenizer.eos_token_id])[0]
