"""What the two programs share: one clear line for each error, and exit codes."""

import logging
import sys
from collections.abc import Callable

from relax.trainers.loop import Interrupted, Stopped

logger = logging.getLogger("relax")


def exit_on_error(function: Callable[[], None], kept: str = "") -> None:
    """Runs `function`; ends the process with a code where it can't go on.

    A ValueError, an OSError or a missing package is the user's to mend: its message is
    logged in one line (hydra.verbose=relax shows where it came from) and the code is 1.
    A run that a signal stopped, its state saved, ends with 128 plus the signal's
    number. `kept`: what an interrupt leaves as it was, in words. Any other exception is
    ours, and is raised.
    """
    try:
        function()
    except Stopped as stopped:
        logger.warning("%s", stopped)
        sys.exit(stopped.exit_code)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        line = " ".join(str(error).split())
        # A text of the user's may hold half a surrogate pair, which no stream takes.
        logger.error("%s", line.encode("utf-8", "backslashreplace").decode())
        logger.debug("raised here:", exc_info=True)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        if isinstance(interrupt, Interrupted) and not interrupt.has_checkpoint:
            kept = ""
        logger.warning("%s", "; ".join(filter(None, ("interrupted", kept))))
        sys.exit(130)
