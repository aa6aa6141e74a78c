"Fixtures shared by the tests: the project, and clean copies of it to run things in"
import functools, json, os, shutil, signal, socket, subprocess, sys, tempfile, time, urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from warm import begin

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items):
    "What takes longest first, so that two processes end together"
    order = ('test_pipeline', 'test_notebooks')
    items.sort(key=lambda x: order.index(x.path.stem) if x.path.stem in order else len(order))


BIN = Path(sys.executable).parent


def environment(**more):
    "This environment's tools first on the path, and no hub"
    path = f'{BIN}{os.pathsep}{os.environ["PATH"]}'
    return dict(os.environ, PATH=path, HF_HUB_OFFLINE='1', PYTHONPATH='') | more


@functools.cache
def warm(): # what to add to an environment
    """Kernels, and the commands of `warm.py`, begin as forks of a process that has imported PyTorch and transformers already, for which
    each would take five seconds. One such process serves all that test at the same time, and ends with them"""
    if not hasattr(os, 'pidfd_open'): return {}
    session = os.getppid() if 'PYTEST_XDIST_WORKER' in os.environ else os.getpid()
    folder = Path(tempfile.gettempdir())/f'simpledeco-warm-{session}'
    try: folder.mkdir()
    except FileExistsError: pass # somebody has started it
    else: begin(folder, session, environment())
    end = time.time() + 120
    while not (folder/'socket').exists() and time.time() < end: time.sleep(.1)
    assert (folder/'socket').exists(), (folder/'log').read_text()
    return dict(JUPYTER_PATH=str(folder), PATH=f'{folder/"bin"}{os.pathsep}{environment()["PATH"]}')


def run(*command, cwd, check=True, env={}, **kw):
    """Run a command with this environment's tools first on the path; its output goes into the error
    message"""
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment(**env), capture_output=True,
                          text=True, **kw)
    said = f'{command} failed\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    assert not check or done.returncode == 0, said
    return done


def uneven_head(model, folder): # TemperatureHead, saved in the folder
    "A head whose temperatures differ from token to token"
    import torch
    from simpledeco.head import TemperatureHead
    from simpledeco.model import fingerprint
    torch.manual_seed(3)
    d = model.get_output_embeddings().weight.shape[1]
    head = TemperatureHead(d, width=0, reads='hidden', base_model=fingerprint(model)).eval()
    head.mean.fill_(1.); head.std.fill_(4.)
    head.save_pretrained(folder)
    return head


def fits(drawn, p):
    "The p-value of a chi-square test; 0 where a token was drawn that should not be"
    from scipy.stats import chisquare
    n, counts = len(drawn), drawn.bincount(minlength=len(p))
    if not (p[drawn] > 0).all(): return 0.
    common = p*n >= 5
    seen, wanted = counts[common].tolist(), (p[common]*n).tolist()
    rest = n - sum(wanted)
    if rest >= 5: seen.append(n - sum(seen)); wanted.append(rest)
    else: seen[-1] += n - sum(seen); wanted[-1] += rest
    return chisquare(seen, wanted).pvalue if len(seen) > 1 else 1. # one token alone


def beginnings(tokenizer, words): # token ids [n]
    "The tokens with which one of some words may begin"
    import torch
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return torch.tensor([i for i,text in enumerate(texts) if text and any(w.startswith(text) for w in words)])


@contextmanager
def vllm_server(log, *options): # the address; `log` is a file
    "`vllm serve` on a free port of this machine"
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    command = [Path(sys.executable).parent/'vllm', 'serve', *options, '--served-model-name', 'smol', '--host', '127.0.0.1', '--port', port,
               '--dtype', 'float32', '--max-model-len', 512, '--enforce-eager', '--block-size', 32]
    with open(log, 'w') as f:
        process = subprocess.Popen([str(c) for c in command], stdout=f, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-3000:]
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=5); break
            except OSError: time.sleep(2)
        yield f'http://127.0.0.1:{port}'
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def post(server, path, **body): # what the server answers
    request = urllib.request.Request(server + path, json.dumps(dict(model='smol', **body)).encode(), {'Content-Type': 'application/json'})
    return json.load(urllib.request.urlopen(request, timeout=300))


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    """A fresh clone for each file of tests, which may change it: the tracked files as they are now,
    committed in a repository of their own"""
    folder = tmp_path_factory.mktemp('clone')/'simpledeco'
    for name in run('git', 'ls-files', '-co', '--exclude-standard', cwd=ROOT).stdout.splitlines():
        if not (ROOT/name).exists(): continue
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/name, folder/name)
    run('git', 'init', '-q', cwd=folder)
    run('git', 'add', '-A', cwd=folder)
    run('git', '-c', 'user.name=test', '-c', 'user.email=test@example.org', 'commit', '-qm',
        'clone', cwd=folder)
    run('git', 'config', 'user.name', 'test', cwd=folder)
    run('git', 'config', 'user.email', 'test@example.org', cwd=folder)
    return folder
