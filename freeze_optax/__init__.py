"""Parameter freezing for JAX: one spec for gradients, updates, optimizer state and decay."""

from freeze_optax import _former_names
from freeze_optax import testing as testing
from freeze_optax._edit.adjust import adjust as adjust
from freeze_optax._edit.adopt_release import adopt as adopt
from freeze_optax._edit.adopt_release import release as release
from freeze_optax._edit.freeze_thaw import freeze as freeze
from freeze_optax._edit.freeze_thaw import set_frozen as set_frozen
from freeze_optax._edit.freeze_thaw import thaw as thaw
from freeze_optax._edit.phases import Phases as Phases
from freeze_optax._edit.place import place as place
from freeze_optax._edit.place import place_state as place_state
from freeze_optax._edit.rotating import rotating as rotating
from freeze_optax._edit.scheduled import scheduled as scheduled
from freeze_optax._export.export_state import export_state as export_state
from freeze_optax._export.exported_programs import (
    register_for_jax_export as register_for_jax_export,
)
from freeze_optax._export.import_state import import_state as import_state
from freeze_optax._params.apply_updates import apply_updates as apply_updates
from freeze_optax._params.assign import assign as assign
from freeze_optax._params.gradient_scores import gradient_scores as gradient_scores
from freeze_optax._params.gradients import grad as grad
from freeze_optax._params.gradients import value_and_grad as value_and_grad
from freeze_optax._params.hold import hold as hold
from freeze_optax._params.partition import merge as merge
from freeze_optax._params.partition import partition as partition
from freeze_optax._params.scan import scan as scan
from freeze_optax._params.stacking import stack_layers as stack_layers
from freeze_optax._params.stacking import unstack_layers as unstack_layers
from freeze_optax._params.streamed import streamed as streamed
from freeze_optax._params.weight_scores import weight_scores as weight_scores
from freeze_optax._policy.convergence import Convergence as Convergence
from freeze_optax._policy.decision import Decision as Decision
from freeze_optax._report.score_plot import plot_scores as plot_scores
from freeze_optax._report.scores import Score as Score
from freeze_optax._report.scores import Scores as Scores
from freeze_optax._report.scores import scores as scores
from freeze_optax._report.summary import Summary as Summary
from freeze_optax._report.summary import summary as summary
from freeze_optax._select.by_element import elements as elements
from freeze_optax._select.by_leaf import labelled as labelled
from freeze_optax._select.by_leaf import where as where
from freeze_optax._select.by_module import by_module as by_module
from freeze_optax._select.by_module import declared as declared
from freeze_optax._select.by_module import of_type as of_type
from freeze_optax._select.by_path import layers as layers
from freeze_optax._select.by_path import path as path
from freeze_optax._select.by_path import regex as regex
from freeze_optax._select.by_rows import rows as rows
from freeze_optax._select.by_score import top_elements as top_elements
from freeze_optax._select.dotted import dotted as dotted
from freeze_optax._select.groups import groups as groups
from freeze_optax._select.mask import labels as labels
from freeze_optax._select.mask import mask as mask
from freeze_optax._select.ranked import bottom_leaves as bottom_leaves
from freeze_optax._select.ranked import top_leaves as top_leaves
from freeze_optax._select.selector import Selector as Selector
from freeze_optax._select.selector import everything as everything
from freeze_optax._select.selector import nothing as nothing
from freeze_optax._state.freeze_state import FreezeState as FreezeState
from freeze_optax._state.shared_buffers import tied_paths as tied_paths
from freeze_optax._transform.freezable import freezable as freezable
from freeze_optax._transform.layerwise import layerwise as layerwise
from freeze_optax._transform.measured import measured as measured
from freeze_optax._transform.rates import rates as rates
from freeze_optax._transform.since_thaw import since_thaw as since_thaw
from freeze_optax._transform.tie import tie as tie

__version__ = "0.1.0"

_former_names.keep_former_names(__name__)
