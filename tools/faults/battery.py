"""Every fault by its id."""

from tools.faults.arena import Fault
from tools.faults.data import DATA
from tools.faults.files import FILES
from tools.faults.hostile import HOSTILE
from tools.faults.kills import KILLS
from tools.faults.layouts import LAYOUTS
from tools.faults.numbers import NUMBERS
from tools.faults.preemption import PREEMPTION
from tools.faults.settings import SETTINGS
from tools.faults.soak import SOAK

ALL = KILLS | PREEMPTION | FILES | NUMBERS | SETTINGS | LAYOUTS | DATA | HOSTILE | SOAK
BATTERY: dict[str, Fault] = {name: ALL[name] for name in sorted(ALL)}
