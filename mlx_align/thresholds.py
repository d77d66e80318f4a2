"""Where an on-policy run is in trouble: what training warns, slows down and stops by, and its page.

From RLHF practice: ratios and KLs after Schulman et al. 2017, Huang et al. 2024 and OpenRLHF; text
statistics our choice, at the values where samples read as broken.
"""

# Nats per token from the policy that sampled: passes over a rollout batch end; and where the
# learning rate is halved.
KL_ENDS_EPOCHS, KL_HALVES = 0.03, 0.1
# Shares: of tokens clipped, of completions that ended.
CLIPPED_WARNS = 0.3
ENDED_WARNS = 0.8
# Rollout batches before a critic must explain something.
EXPLAINED_FROM = 30
# Share of the first entropy.
ENTROPY_STOPS = 0.3
# Nats per completion of so many tokens from the reference; longer ones may move further.
KL_WARNS, KL_STOPS, KL_TOKENS = 15.0, 30.0, 128
# Times the first length; more repeated 4-grams, and fewer different pairs, than at first.
LENGTH_WARNS, LENGTH_STOPS = 1.5, 2.5
REPEATED_WARNS, REPEATED_STOPS = 0.05, 0.15
DISTINCT_WARNS, DISTINCT_STOPS = 0.2, 0.4
