"""Parameter freezing for JAX: one spec for gradients, updates, optimizer state and decay."""

from freeze_optax import testing as testing
from freeze_optax._adopt import adopt as adopt
from freeze_optax._adopt import release as release
from freeze_optax._apply import apply_updates as apply_updates
from freeze_optax._assign import assign as assign
from freeze_optax._edit import freeze as freeze
from freeze_optax._edit import set_frozen as set_frozen
from freeze_optax._edit import thaw as thaw
from freeze_optax._export import export_state as export_state
from freeze_optax._export import import_state as import_state
from freeze_optax._grad import grad as grad
from freeze_optax._grad import value_and_grad as value_and_grad
from freeze_optax._mask import labels as labels
from freeze_optax._mask import mask as mask
from freeze_optax._partition import hold as hold
from freeze_optax._partition import merge as merge
from freeze_optax._partition import partition as partition
from freeze_optax._phases import Phases as Phases
from freeze_optax._scan import scan as scan
from freeze_optax._scheduled import scheduled as scheduled
from freeze_optax._select import labelled as labelled
from freeze_optax._select import layers as layers
from freeze_optax._select import path as path
from freeze_optax._select import regex as regex
from freeze_optax._select import where as where
from freeze_optax._select_modules import by_module as by_module
from freeze_optax._select_modules import declared as declared
from freeze_optax._select_modules import of_type as of_type
from freeze_optax._select_rows import rows as rows
from freeze_optax._selectors import Selector as Selector
from freeze_optax._selectors import everything as everything
from freeze_optax._selectors import nothing as nothing
from freeze_optax._state import FreezeState as FreezeState
from freeze_optax._summary import Summary as Summary
from freeze_optax._summary import summary as summary
from freeze_optax._tie import tie as tie
from freeze_optax._ties import tied_paths as tied_paths
from freeze_optax._transform import freezable as freezable

__version__ = "0.1.0"
