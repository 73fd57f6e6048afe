"""What every registered mechanism must do: checks that take a `Subject`, run over the whole registry.

A mechanism is skipped only where it declares that it cannot; the reason says so.
"""

from . import contract, costs, geometry, graphs, precision
from .subject import Subject, subjects

# Once for each mechanism, and again for every other value of its options.
VARIANT_CHECKS = (
    geometry.rounds_over_tiles_are_dense,
    geometry.merge_is_associative,
    geometry.padded_batch_is_each_image_alone,
    geometry.dropped_tokens_never_leak,
    contract.gradients_are_right,
    precision.half_models_are_finite,
    precision.error_is_that_of_float32,
)

# Once for each mechanism.
CHECKS = (
    *VARIANT_CHECKS,
    geometry.any_grid_and_prefix,
    geometry.dropping_is_removing,
    geometry.nothing_kept_is_finite,
    geometry.context_on_another_grid,
    geometry.packed_batch_is_each_image_alone,
    geometry.packed_context_is_each_image_alone,
    geometry.keys_of_a_reduced_grid,
    geometry.causal_is_the_past_only,
    geometry.causal_tiles_are_a_scan,
    contract.incapable_says_who_can,
    contract.bad_arguments_are_one_line,
    contract.module_protocol,
    contract.fused_is_plain,
    costs.linear_memory_and_work,
    precision.states_are_full_precision,
    precision.autocast_is_finite,
    precision.long_sequences,
    precision.no_number_is_left_unwritten,
)

# Once for the first mechanism of a kind; for all by `pytest -m full`.
SLOW_CHECKS = tuple(graphs.CHECKS.values())

__all__ = ["CHECKS", "SLOW_CHECKS", "VARIANT_CHECKS", "Subject", "subjects"]
