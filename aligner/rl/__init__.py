"""Learning from one's own answers: prompts and rollouts, rewards, advantages."""
