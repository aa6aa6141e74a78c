"""A process that has imported PyTorch and transformers, which takes seconds, forks for whoever wants a Python with them:
`python -S tests/warm.py SOCKET -m MODULE ...` and `... SOCKET SCRIPT ...` do what `python -m MODULE ...` and
`python SCRIPT ...` do. Nothing of this project is imported before the fork"""
import json, os, select, signal, socket, sys

LIBRARIES = ('torch', 'transformers.models.llama.modeling_llama', 'transformers.models.auto.tokenization_auto',
             'scipy.stats', 'papermill', 'ipykernel.kernelapp') # not pandas, which asks at once whether it is in a kernel


def begin(folder, session, environ):
    "Start it, for as long as a process lives, and write a kernel and commands that ask it for a fork, before the plain ones on the path"
    import shlex, subprocess
    here, python = os.path.abspath(__file__), os.path.join(os.path.dirname(sys.executable), 'python')
    ask = [python, '-S', here, str(folder/'socket')]
    shell = {name: f'exec {shlex.join([*ask, os.path.join(os.path.dirname(python), name)])} "$@"' for name in ('simpledeco', 'nbdev-test')}
    shell['python'] = f'case "$1" in -m|*.py) exec {shlex.join(ask)} "$@" ;; esac\nexec {shlex.quote(python)} "$@"'
    (folder/'bin').mkdir()
    for name,text in shell.items():
        (folder/'bin'/name).write_text(f'#!/bin/sh\n{text}\n')
        (folder/'bin'/name).chmod(0o755)
    (folder/'kernels/python3').mkdir(parents=True)
    (folder/'kernels/python3/kernel.json').write_text(json.dumps(dict(
        argv=[*ask, '-m', 'ipykernel_launcher', '-f', '{connection_file}'], display_name='Python 3 (ipykernel)', language='python')))
    with open(folder/'log', 'w') as log:
        subprocess.Popen([python, here, '--serve', folder/'socket', str(session)], env=environ, start_new_session=True,
                         stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def serve(path, session): # [arguments], in a fork, for each that asks
    "Fork again and again, until a process has ended"
    import gc, importlib, shutil
    for name in LIBRARIES: importlib.import_module(name)
    gc.freeze()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.bind(f'{path}.new')
        s.listen(64)
        os.rename(f'{path}.new', path)
        children, session = set(), os.pidfd_open(int(session))
        while True:
            asked, _, _ = select.select([s, session], [], [], 1)
            children -= {x for x in children if os.waitpid(x, os.WNOHANG)[0]}
            if session in asked:
                shutil.rmtree(os.path.dirname(path))
                sys.exit()
            if s not in asked: continue
            with s.accept()[0] as asker:
                guard = os.fork()
                if not guard:
                    s.close()
                    return guarded(asker)
            children.add(guard)


def guarded(asker): # the arguments, in a fork of its own
    "Be a guard that tells the asker how the work ended, and ends it with the asker"
    text, fds, _, _ = socket.recv_fds(asker, 2**20, 3)
    work = os.fork()
    if work:
        for fd in fds: os.close(fd)
        done = os.pidfd_open(work)
        if asker in select.select([asker, done], [], [])[0]: os.kill(work, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(work, 0)[1])
        try: asker.send(str(code).encode())
        except OSError: pass # it is gone
        os._exit(0)
    asker.close()
    os.setsid()
    for n,fd in enumerate(fds): os.dup2(fd, n); os.close(fd)
    sys.stdin, sys.stdout = open(0), open(1, 'w', buffering=1 if os.isatty(1) else -1)
    sys.stderr = open(2, 'w', buffering=1, errors='backslashreplace')
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    wanted = json.loads(text)
    os.chdir(wanted['cwd'])
    os.environ.clear()
    os.environ.update(wanted['environ'])
    return wanted['arguments']


def become(arguments):
    "Do what Python does with them, but for taking what was imported apart at the end, which is a second of nothing"
    import atexit, threading, traceback
    try: run(arguments); code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if code and code is not e.code: print(e.code, file=sys.stderr)
    except BaseException: traceback.print_exc(); code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for f in (sys.stdout, sys.stderr): f.flush()
    os._exit(code)


def run(arguments):
    import functools, runpy
    if arguments[0] == '-m':
        sys.argv, first = arguments[1:], os.getcwd()
        work = functools.partial(runpy.run_module, arguments[1], alter_sys=True)
    else:
        sys.argv, first = arguments, os.path.dirname(os.path.abspath(arguments[0]))
        work = functools.partial(runpy.run_path, arguments[0])
    sys.path[:1] = [first, *filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))]
    work(run_name='__main__')


def ask(path, arguments): # the exit code
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.connect(path)
        wanted = dict(arguments=arguments, cwd=os.getcwd(), environ=dict(os.environ))
        socket.send_fds(s, [json.dumps(wanted).encode()], [0, 1, 2])
        return int(s.recv(16) or 1)


if __name__ == '__main__':
    if sys.argv[1] == '--serve': become(serve(*sys.argv[2:]))
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
