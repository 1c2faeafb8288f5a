"""What the nightly run has that CI, with half an hour on two cores, has not."""

import os

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
NIGHTLY = PROFILE != "ci"

# Of the cases of these tests CI runs one of so many: nearly all of their time goes into
# compiling one and the same program for one method, layout or container more. The fuzz
# suite has every method in every run.
ONE_OF = {
    "test_bad_input::test_a_damaged_checkpoint_is_an_error_or_of_no_consequence": 3,
    "test_contract::test_contract": 3,
    "test_containers::test_container_of_parameters": 3,
    "test_containers::test_inside_another_transformation": 2,
    "test_cyclic::test_cyclical_is_what_numpy_makes_of_it": 2,
    "test_experiments::test_every_method_trains": 2,
    "test_experiments::test_one_step_is_the_textbook_step": 2,
    "test_ghosts::test_a_run_stopped_at_any_phase_goes_on_exactly": 2,
    "test_ghosts::test_after_the_ghosts_the_network_is_the_plain_one": 3,
    "test_ghosts::test_ghosts_stand_beside_the_convolutions": 4,
    "test_initial::test_the_masks_are_the_same_on_any_devices": 3,
    "test_initial::test_training_starts_from_the_masks_of_the_source": 3,
    "test_models::test_batch_statistics_change_in_training_only": 2,
    "test_models::test_logits_depend_on_every_parameter": 2,
    "test_models::test_shapes_and_dtypes": 2,
    "test_moments::test_moments_of_every_inner_optimizer": 2,
    "test_moments::test_traps": 2,
    "test_notebooks::test_runs_from_a_new_kernel": 4,
    "test_oracle::test_as_the_last_link": 3,
    "test_oracle::test_every_method_follows_the_oracle": 3,
    "test_oracle::test_ties_in_the_general_way": 2,
    "test_oracle::test_parameters_that_nobody_masked": 2,
    "test_packed::test_on_eight_devices_as_on_one": 4,
    "test_packed::test_every_run_is_as_with_bytes": 4,
    "test_parallel::test_weights_that_live_on_are_trained_alike": 2,
    "test_plasticity::test_prunes_as_numpy_does": 2,
    "test_resume::test_a_checkpoint_of_8_devices_is_gone_on_from_on_1_and_on_4": 3,
    "test_resume::"
    "test_a_run_that_is_stopped_again_and_again_ends_like_one_that_is_not": 3,
    "test_scale::test_what_is_sent_does_not_depend_on_the_size_of_leaves": 2,
    "test_sharding::test_data_parallel_jit_equals_one_device": 5,
    "test_sharding::test_sharded_equals_one_device": 5,
    "test_sharding::test_sharded_step_moves_counts_only": 4,
    "test_sharding::test_pmap_equals_one_device": 3,
    "test_sharding_later::test_sharded_equals_one_device": 3,
    "test_streaming::test_several_devices_share_every_batch": 2,
    "test_structures::test_equal_numbers_in_methods": 2,
    "test_structures::test_lanes_of_vmap_are_as_alone": 3,
    "test_structures::test_on_eight_devices_as_on_one": 2,
    "test_structures::test_random_masks": 2,
    "test_transforms::test_a_run_compiles_once_and_transfers_nothing": 3,
    "test_transforms::test_a_traced_seed_is_the_same_seed": 3,
    "test_transforms::test_donated_buffers": 3,
    "test_transforms::test_eager_equals_jit": 3,
    "test_transforms::test_no_tracer_leaks": 4,
    "test_transforms::test_scan_equals_loop": 3,
    "test_transforms::test_vmap_over_seeds_equals_loop_over_seeds": 4,
}

# And none of these, of half a minute to two; in CI stand for them, in this order: the
# trainings with Fashion-MNIST and with the defaults that are steps of their own; deep
# networks of a few units; small chains; two processes that share parameters; signals
# that stop one process; smaller trees.
AT_NIGHT = (
    "test_data::test_fashion_mnist_of_the_package_is_complete",
    "test_experiments::test_the_default_network_trains_into_the_default_folder",
    "test_initial::test_synflow_of_a_deep_network_does_not_overflow",
    "test_processes::test_pmap_over_two_processes",
    "test_processes::test_a_pre_emption_stops_both_at_one_step_and_they_go_on_exactly",
    "test_scale::test_resnet50_sends_less_than_64_kib_an_update",
)

# Files of a minute and more: begun with, so that none is left to one process at last.
LONG = (
    *("resume", "oracle", "fuzz", "flow", "experiments", "sharding", "initial"),
    *("lottery", "ghosts", "scale", "parallel", "transforms", "plasticity_study"),
    *("structures", "readme", "bad_input", "data", "models", "tost_lrsi", "processes"),
    *("notebooks", "loss_scores", "selection", "packed", "purity"),
)
