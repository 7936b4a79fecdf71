"""Every fault by its id."""

from tests.faults.arena import Fault
from tests.faults.data import DATA
from tests.faults.files import FILES
from tests.faults.hostile import HOSTILE
from tests.faults.kills import KILLS
from tests.faults.layouts import LAYOUTS
from tests.faults.numbers import NUMBERS
from tests.faults.preemption import PREEMPTION
from tests.faults.settings import SETTINGS
from tests.faults.soak import SOAK

ALL = KILLS | PREEMPTION | FILES | NUMBERS | SETTINGS | LAYOUTS | DATA | HOSTILE | SOAK
BATTERY: dict[str, Fault] = {name: ALL[name] for name in sorted(ALL)}
