"""The keys of the report's JSON: where scores lie in a MetricsReport, and what the document's own keys mean.

Read by services/report.py alone.
"""

SCORES: dict[str, tuple[str, ...]] = {
    "l0": ("l0",),
    "fvu": ("fvu",),
    "dead_share": ("dead_share",),
    "ce_recovered": ("fidelity", "ce_recovered"),
    "ce_recovered_mean_ablation": ("fidelity", "ce_recovered_mean_ablation"),
    "kl_recovered": ("fidelity", "kl_recovered"),
    "ce_clean": ("fidelity", "ce_clean"),
    "ce_sae": ("fidelity", "ce_sae"),
    "ce_zero": ("fidelity", "ce_zero"),
    "ce_mean": ("fidelity", "ce_mean"),
    "kl_sae": ("fidelity", "kl_sae"),
    "kl_zero": ("fidelity", "kl_zero"),
    "sparse_probing": ("probing", "mean", "sparse"),
    "tpp": ("erasure", "tpp"),
    "tpp_intended": ("erasure", "intended"),
    "tpp_unintended": ("erasure", "unintended"),
    "mean_max_decoder_cosine": ("geometry", "mean_max_decoder_cosine"),
    "mean_encoder_decoder_cosine": ("geometry", "mean_encoder_decoder_cosine"),
}
"""Key of a SAE in the report -> path in MetricsReport.metrics."""

TRAJECTORY = (
    "l0",
    "fvu",
    "dead_share",
    "ce_recovered",
    "ce_recovered_mean_ablation",
    "kl_recovered",
    "sparse_probing",
    "tpp",
)
"""Scores that earlier checkpoints keep in the report."""

NOT_EVALUATED = {path[0]: {"omitted": "No checkpoint has been evaluated yet."} for path in SCORES.values()}
"""Stands for the metrics of a SAE that has none."""

DEFINITIONS = {
    "variant": "BatchTopK SAE, or its Matryoshka form with fixed nested widths or with random prefixes.",
    "k": "Mean number of active latents per token in training.",
    "step": "Training steps behind the checkpoint.",
    "rows_trained": "Rows (tokens) that the checkpoint had been trained on, repeats over epochs included.",
    "training": "The last point of the training curves: figures on one training batch.",
    "trajectory": "The same scores of this SAE's earlier checkpoints, oldest first.",
    "ce_clean": "Next-token cross-entropy of the untouched model, nats per token.",
    "ce_sae": "Cross-entropy with the SAE's reconstruction in place of the activation, nats per token.",
    "ce_zero": "Cross-entropy with the activation set to zero, nats per token.",
    "ce_mean": "Cross-entropy with the activation set to its mean, nats per token.",
    "kl_sae": "KL divergence of the spliced from the clean next-token distribution, nats per token.",
    "kl_zero": "KL divergence of the zero-ablated from the clean next-token distribution, nats per token.",
    "tpp_intended": "The part of TPP that is wanted: accuracy lost on the concept whose latents are erased.",
    "tpp_unintended": "The part of TPP that is not: mean accuracy lost on the other concepts.",
    "residual_stream": "The same procedure on channels of the activation itself, in place of latents.",
    "random_directions": "The same procedure on projections onto random directions, the mean over several draws.",
    "dense_probe": "Mean over concepts of the accuracy of a logistic probe that reads the whole activation.",
    "firing_rate": "Share of usable held-out tokens on which a latent is active.",
    "prefix_group": "The smallest nested width that holds the latent.",
    "stages": "Wall seconds of each stage in the invocation that ended the run; evaluation may begin during training.",
    "steal_share": "Share of processor time that the hypervisor gave to other machines during the run.",
    "restarts": "Actors that died and were replaced.",
    "samples": "Tokens, documents, examples and seeds behind the scores; one training run per SAE.",
}
"""Of the keys that are this document's own; the evaluation defines its scores, and wins where both do."""
