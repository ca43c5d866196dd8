"""The environment and the working directory of a template, and so of every worker."""

import errno
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import uuid
from collections.abc import Mapping
from typing import IO, Any

from torchrunx_ray.agent.machine.sweep import kill_marked
from torchrunx_ray.wire import environment, process_tree
from torchrunx_ray.wire.messages import TemplateWanted

_SOURCING_S = 60

# The path of `env` is looked up first, since the file may change PATH. The file may set any name, so ours are long.
_SOURCE = """
__torchrunx_ray_env=$(command -v env)
set -a
source "$1" >&2
set -- "$?"
set +a
"$__torchrunx_ray_env" -0 && exit "$1"
IFS=$' \\t\\n'
for __torchrunx_ray_name in $(compgen -e); do
    __torchrunx_ray_value=${!__torchrunx_ray_name}
    [ ${#__torchrunx_ray_value} -gt 65536 ] && echo "Linux starts no process with $__torchrunx_ray_name," \\
        "which has ${#__torchrunx_ray_value} characters" >&2
done
exit 126
"""
_SENT = "runtime_resources"
"""The folder in which Ray unpacks `working_dir` and `py_modules`."""

_BASHS_OWN = {"_", "SHLVL", "PWD", "OLDPWD", environment.MARK}


def template_environment(wanted: TemplateWanted, ray_address: str, cwd: str) -> dict[str, str]:
    """Return the template's environment. Later sources win: the agent's, the driver's, env_file's, explicit values."""
    made = environment.for_template(
        os.environ,
        dict(wanted.driver_variables),
        same_interpreter=sys.executable == wanted.driver_executable,
    )
    _check_sizes(made)
    if wanted.env_file is not None:
        made = _source(os.path.join(cwd, wanted.env_file), made)
    made |= dict(wanted.explicit_variables)
    if not wanted.one_worker:
        # As torchrun does. OpenMP reads the variable when torch is loaded, so a worker could not set it later.
        made.setdefault("OMP_NUM_THREADS", "1")
    made["RAY_ADDRESS"] = ray_address
    _check_sizes(made)
    return made


def search_path(
    wanted: TemplateWanted, made: Mapping[str, str], cwd: str, runtime_env: Mapping[str, Any]
) -> list[str]:
    """Return the agent's sys.path, with the folders of a worker's PYTHONPATH.

    These folders keep their order. They come after the runtime_env's folders: an older copy on the host must not
    shadow code that the runtime_env sends. They come before the rest of the agent's own PYTHONPATH and the
    standard library. If the driver has another interpreter, its PYTHONPATH comes last, so that it shadows nothing
    on this host.
    """
    own = list(sys.path)
    brought = _brought(runtime_env)
    agents = set(_folders(os.environ.get("PYTHONPATH"), os.getcwd())).difference(brought)
    of_agent = (i for i, each in enumerate(own) if each in agents or _is_standard(each))
    first_of_agent = next(of_agent, len(own))
    before, after = own[:first_of_agent], own[first_of_agent:]
    first = [each for each in _folders(made.get("PYTHONPATH"), cwd) if each not in before]
    found = before + first + [each for each in after if each not in first]
    if sys.executable == wanted.driver_executable:
        return found
    of_driver = _folders(dict(wanted.driver_variables).get("PYTHONPATH"), cwd)
    return found + [each for each in of_driver if each not in found]


def python_path(made: Mapping[str, str], runtime_env: Mapping[str, Any]) -> str | None:
    """Return the PYTHONPATH of workers, for their child processes; the runtime_env's folders come first."""
    wanted = made.get("PYTHONPATH")
    brought = _brought(runtime_env)
    if not brought:
        return wanted
    entries = wanted.split(os.pathsep) if wanted else []
    return os.pathsep.join(brought + [each for each in entries if each not in brought])


def _brought(runtime_env: Mapping[str, Any]) -> list[str]:
    """Return the folders of the agent's PYTHONPATH that the runtime_env sent or named."""
    here = os.getcwd()
    named = _folders(runtime_env.get("env_vars", {}).get("PYTHONPATH"), here)
    folders = _folders(os.environ.get("PYTHONPATH"), here)
    return [each for each in folders if each in named or _SENT in each.split(os.sep)]


def _folders(python_path: str | None, cwd: str) -> list[str]:
    entries = python_path.split(os.pathsep) if python_path else []
    return list(dict.fromkeys(os.path.normpath(os.path.join(cwd, entry)) for entry in entries))


def _is_standard(folder: str) -> bool:
    major, minor, *_ = sys.version_info
    is_archive = os.path.basename(folder) == f"python{major}{minor}.zip"
    return is_archive or folder == sysconfig.get_path("stdlib")


def env_file_version(wanted: TemplateWanted, cwd: str) -> tuple[int, int] | None:
    """Return a value that changes when the file changes; None if there is no file."""
    if wanted.env_file is None:
        return None
    try:
        stat = os.stat(os.path.join(cwd, wanted.env_file))
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


def working_directory(wanted: TemplateWanted, in_job_working_dir: bool) -> tuple[str, str | None]:
    """Return the function's working directory, and a warning if the driver's cannot be used."""
    here = os.getcwd()
    if in_job_working_dir:
        return here, None
    if os.path.isdir(wanted.driver_cwd) and os.access(wanted.driver_cwd, os.X_OK):
        return wanted.driver_cwd, None
    return here, (
        f"the driver's folder {wanted.driver_cwd} cannot be used on this host; the function runs in {here}"
    )


def why_no_process(error: OSError, made: Mapping[str, str]) -> str:
    """Explain to the user why no process could be started with this environment."""
    if error.errno == errno.E2BIG:
        return f"the environment of workers: {environment.too_large_together(made)}"
    return f"the process that starts the template could not be started: {error}"


def _check_sizes(made: Mapping[str, str]) -> None:
    if (problem := environment.too_large(made)) is not None:
        raise ValueError(f"the environment of workers: {problem}")


def _source(path: str, base: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that bash exports after it has sourced the file, starting from `base`."""
    if not os.path.exists(path):
        raise ValueError(
            f"env_file={path!r}: No such file or directory. The file is read on every host of the launch, not on the "
            "driver's machine. Put the file on all hosts, or pass its values as extra_env_vars."
        )
    code, output, errors = _run_bash(path, base)
    if code is None:
        raise ValueError(
            f"env_file={path!r}: bash did not finish sourcing the file within {_SOURCING_S} s."
        )
    said = errors.decode(errors="replace").strip()
    # A last line such as `[ -f x ] && export A=1` may fail silently, although nothing is wrong.
    if code != 0 and said:
        raise ValueError(
            f"env_file={path!r} could not be sourced by bash (exit code {code}):\n{said}"
        )
    if not output:
        raise ValueError(
            f"env_file={path!r} ends the shell that sources the file: use return, not exit."
        )
    pairs = (entry.partition("=") for entry in output.decode(errors="surrogateescape").split("\0"))
    sourced = {name: value for name, _, value in pairs if name and name not in _BASHS_OWN}
    refused = {name for name in sourced if environment.forbidden(name)} - base.keys()
    if refused:
        raise ValueError(
            f"env_file={path!r} sets {', '.join(sorted(refused))}, which the launch itself sets. Remove them from "
            "the file."
        )
    return sourced | {name: base[name] for name in _BASHS_OWN & base.keys()}


def _run_bash(path: str, base: Mapping[str, str]) -> tuple[int | None, bytes, bytes]:
    """Source the file; return bash's exit code (None after a timeout), stdout and stderr.

    Everything that the file started is killed. Output goes to files, because background processes of the file
    would hold pipes open.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        mark = uuid.uuid4().hex
        bash = _start_bash(path, {**base, environment.MARK: mark}, output, errors)
        try:
            code = bash.wait(_SOURCING_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process_tree.signal_group(bash.pid, signal.SIGKILL)
            bash.wait()
            kill_marked(mark)  # processes that left the group, such as a daemon
        output.seek(0)
        errors.seek(0)
        return code, output.read(), errors.read()


def _start_bash(
    path: str, made: Mapping[str, str], output: IO[bytes], errors: IO[bytes]
) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(
            ["bash", "-c", _SOURCE, "bash", path],
            env=made,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            process_group=0,
        )
    except OSError as error:
        if error.errno == errno.E2BIG:  # too large for every process, not only for bash
            raise
        raise ValueError(
            f"env_file={path!r}: bash, which sources the file, could not be started: {error}. The PATH of workers is "
            f"{made.get('PATH')!r}. Install bash in one of these folders, or pass the file's values as "
            "extra_env_vars."
        ) from None
