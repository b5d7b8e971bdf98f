"""Faults that are made in the text of a script, and that the numeric checks must find."""

import pytest
from helpers import ROOT, fork
from test_loss import SCRIPTS, check_clipping, check_loss, check_rewards, check_target_kl

FAULTS = {  # the check that must fail, and in each script that has the first text the second one instead
    "the entropy's sign": (check_loss, "- args.ent_coef * entropy", "+ args.ent_coef * entropy"),
    "no entropy bonus": (check_loss, " - args.ent_coef * entropy", ""),
    "no ratio clipping": (
        check_loss,
        "-torch.min(ratio * advantages, clipped_ratio * advantages)",
        "-(ratio * advantages)",
    ),
    "always the clipped ratio": (
        check_loss,
        "torch.min(ratio * advantages, clipped_ratio * advantages)",
        "(clipped_ratio * advantages)",
    ),
    "no value coefficient": (check_loss, "args.vf_coef * value_loss", "value_loss"),
    "never normalized advantages": (check_loss, "if args.norm_adv:", "if False:"),
    "always normalized advantages": (check_loss, "if args.norm_adv:", "if True:"),
    "the smaller value loss": (check_loss, "torch.max(squared_errors,", "torch.min(squared_errors,"),
    "never clipped values": (check_loss, "if args.clip_vloss:", "if False:"),
    "no gradient clipping": (
        check_clipping,
        "clip_grad_norm_(parameters, args.max_grad_norm",
        "clip_grad_norm_(parameters, math.inf",
    ),
    "the epoch's mean KL divergence": (
        check_target_kl,
        'last_kl = updates[-1]["losses/approx_kl"]',
        'last_kl = (sum(x["losses/approx_kl"] for x in updates[-args.num_minibatches:]) / args.num_minibatches)',
    ),
    "rewards not divided": (check_rewards, "(rewards / agent.return_statistics.std.item())", "rewards"),
    "rewards not scaled": (check_rewards, "rewards * max(1 - args.gamma, 1 / T)", "rewards"),
    "rewards not clipped to their sign": (check_rewards, "np.sign(scores)", "scores"),
}
ONLY_IN = {
    "rewards not divided": ["ppo_continuous_action"],
    "rewards not scaled": ["ppo_lstm"],
    "rewards not clipped to their sign": ["ppo_atari", "ppo_atari_multigpu"],
}
EVERY = [(script, fault) for fault in FAULTS for script in ONLY_IN.get(fault, SCRIPTS)]


@pytest.mark.quick
@pytest.mark.parametrize(("script", "fault"), EVERY)
def test_a_fault_is_found(script, fault):
    """The check fails with the fault. That it passes without is tested in test_loss.py."""
    check, right, wrong = FAULTS[fault]
    module = fork(script, (right, wrong), script=script)
    with pytest.raises(AssertionError):
        check(module)


def test_every_script_with_the_line_has_the_fault():
    for fault, (_, right, _) in FAULTS.items():
        assert [x for x in SCRIPTS if right in (ROOT / f"{x}.py").read_text()] == list(ONLY_IN.get(fault, SCRIPTS))
