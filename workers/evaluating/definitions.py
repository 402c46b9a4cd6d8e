"""What each score of a report means, in one sentence each; goes into every report and onto its page."""

DEFINITIONS: dict[str, str] = {
    "ce_recovered": (
        "(CE_zero - CE_sae) / (CE_zero - CE_clean): next-token cross-entropy in nats with the reconstruction spliced "
        "in, between the clean pass (1) and zero ablation of every position of the hook (0), averaged over usable "
        "context tokens. BOS, padding and special positions keep their own activation in the spliced pass."
    ),
    "ce_recovered_mean_ablation": (
        "The same with the usable positions set to the hook's mean activation over the harvested rows in place of zero."
    ),
    "kl_recovered": "(KL_zero - KL_sae) / KL_zero with KL(clean || patched) of the next-token distributions in nats.",
    "fvu": (
        "Fraction of variance unexplained, textbook: sum |x - x_hat|^2 / sum |x - mean x|^2 over the usable held-out "
        "rows of the fidelity windows, with the first `prefix` latents alone; codes by the inference threshold."
    ),
    "l0": "Mean number of active latents per usable held-out token, codes by the inference threshold.",
    "dead_share": "Share of latents that fire on none of the usable held-out tokens counted.",
    "mean_max_decoder_cosine": (
        "Mean over latents that fired of the largest cosine of its decoder row to that of any other such latent."
    ),
    "mean_encoder_decoder_cosine": (
        "Mean over latents that fired of the cosine between its encoder and its decoder row."
    ),
    "sparse_probing": (
        "Mean over concepts of the balanced accuracy of a logistic probe on the k latents whose class means differ "
        "most; chosen and fitted on one half of the held-out documents, tested on the other half, on the same balanced "
        "samples for every SAE."
    ),
    "probing_residual": "The same with k channels of the residual stream in place of k latents.",
    "probing_control": "The same with k random directions of the residual stream, mean over the controls.",
    "probing_dense": "The same probe on all channels of the residual stream.",
    "tpp": (
        "Targeted probe perturbation, masked: zero-ablate the n latents most attributed to a concept; the drop of its "
        "own dense probe's balanced accuracy minus the mean drop of the other concepts' probes (ancestors and "
        "descendants left out), mean over concepts."
    ),
}
