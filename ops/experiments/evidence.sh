#!/usr/bin/env bash
# The experiments of EVIDENCE.md, one after the other. Finished ones are not repeated, so it may be
# interrupted. Tables and plots are copied to docs/evidence/.
set -euo pipefail
cd "$(dirname "$0")/../.."

export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
katana=.venv/bin/katana
demo=ops/experiments/demo.yaml
runs=runs/evidence
out=docs/evidence
seeds=0-4
all=none,fixed,scheduled,random,random_matched,kat,kat_absolute,kat_inverse

# Evaluated at the beginning and at the end, on 192 problems: half of the noise of the demo's own evaluation.
common=(
    --set runs_dir=$runs --set eval.every_steps=1000 --set eval.problems=192
    --set termination.fixed_tokens=64 --set termination.scheduled_tokens=128 --set termination.scheduled_steps=50
    --set termination.floor_nats=0.045
)

keep() { # grid or file in runs/evidence, name in docs/evidence
    mkdir -p $out
    cp "$runs/$1.csv" "$out/$2.csv"
    cp "$runs/$1.png" "$out/$2.png"
    sed "s#](${1##*/}\.png)#]($2.png)#" "$runs/$1.md" >"$out/$2.md"
}

compare() { # name, options
    local name=$1
    shift
    $katana compare $demo --name "$name" "${common[@]}" "$@"
    keep "$name/compare" "$name"
}

# 1. All policies: the same steps; then the same generated tokens, with two other settings of KAT.
compare steps --policies $all --seeds $seeds --set learner.max_steps=50
compare tokens --policies $all --seeds $seeds --budget tokens:100000 \
    --variant kat_eta_0.3:termination.policy=kat,termination.eta=0.3 \
    --variant kat_window_8:termination.policy=kat,termination.window=8

# 2. Traps: a student that loops in most rollouts, a teacher that in a loop agrees, and a low learning rate, so that the
#    loops last.
[ -f $runs/models/student/pretrain.json ] || $katana pretrain --which student --loop 0.6 --out $runs/models
[ -f $runs/models/teacher/pretrain.json ] || $katana pretrain --which teacher --leave-loop 0.02 --out $runs/models
traps=(
    --set student.model=$runs/models/student --set teacher.model=$runs/models/teacher
    --set learner.learning_rate=5e-5 --set termination.eta=0.3
)
compare traps --policies none,fixed,random,random_matched,kat --seeds $seeds --budget tokens:100000 "${traps[@]}"
# The same with an η by which, as the replay says, traps are cut and little else.
compare traps-eta-0.6 --policies random_matched,kat --seeds $seeds --budget tokens:100000 "${traps[@]}" \
    --set termination.eta=0.6

# 3. Whether what was cut could still have been right; and other settings, from runs that cut nothing.
shadow() { # name, options
    local name=$1
    shift
    [ -f $runs/"$name"/summary.json ] || $katana run $demo --name "$name" "${common[@]}" "$@" --fresh \
        --set learner.max_steps=50 --set termination.shadow=true
    $katana replay $runs/"$name" --sweep termination.policy=fixed,scheduled,random,kat,kat_absolute,kat_inverse
    keep "$name/replay/replay" "replay-$name-policies"
    $katana replay $runs/"$name" --sweep termination.eta=0.3,0.6,0.8 --sweep termination.window=8,16,32 \
        --sweep termination.buffer_size=128,512
    keep "$name/replay/replay" "replay-$name"
}
shadow shadow
shadow shadow-traps "${traps[@]}"
audit() { # student, runs
    local run student=$1
    shift
    for run in "$@"; do
        [ -f $runs/"$run"/audit/audit.png ] || $katana audit $runs/"$run" --student "$student"
        keep "$run/audit/audit" "audit-${run//\//-}"
    done
}
audit ops/models/student steps/{kat,random_matched,kat_inverse,random}-s0
audit $runs/models/student traps/{kat,random_matched}-s0

# 4. A student that ends with another token than its teacher: STOP as one event, and token by token.
[ -f $runs/models/exchanged/model.safetensors ] || $katana pretrain --exchange-end ops/models/student --out $runs/models/exchanged
compare stop-set --policies none --seeds 0-2 --set learner.max_steps=50 --set student.model=$runs/models/exchanged \
    --variant by_token:termination.policy=none,rollout.stop_set=student

# 5. Does the threshold ratchet? Longer runs, three calibrations.
compare calibration --policies kat --seeds 0-2 --set learner.max_steps=80 \
    --variant completed:termination.policy=kat,termination.calibrate_on=completed \
    --variant everything:termination.policy=kat,termination.calibrate_on=all

# 6. Policies that read more than the divergence, on both tasks at equal tokens; and how many right and wrong rollouts of
#    the second task each would cut, from one run that cuts nothing.
compare traps-signals --policies none,fixed,random_matched,kat,repetition,entropy,margin_change,adaptive --seeds $seeds \
    --budget tokens:100000 "${traps[@]}"
compare signals --policies none,random_matched,kat,repetition,entropy,margin_change,adaptive --seeds $seeds \
    --budget tokens:100000
[ -f $runs/views-traps/summary.json ] || $katana run $demo --name views-traps "${common[@]}" "${traps[@]}" --fresh \
    --set learner.max_steps=50 --set termination.shadow=true --set feeder.record_views=true
$katana replay $runs/views-traps --sweep termination.policy=fixed,kat,repetition,entropy,margin_change,adaptive
keep views-traps/replay/replay replay-views-traps

# 7. Is forward KL robust to stale text, and reverse KL not?
compare staleness --policies none --seeds 0-2 --budget tokens:100000 --set rollout.teacher_support=2 \
    --loss reverse_kl_topk_tail,forward_kl_topk_tail --sweep learner.max_staleness=0,1,4,8
#    Forward KL at lower learning rates than the demo's 5e-4.
compare forward-rates --policies none --seeds 0-1 --budget tokens:100000 --set loss.mode=forward_kl_topk_tail \
    --sweep learner.learning_rate=5e-5,1.5e-4

# 8. A verifier's reward beside the teacher, at equal tokens.
compare reward --policies none --seeds $seeds --budget tokens:100000 --set data.num_generations=4 \
    --variant grpo_0.1:termination.policy=none,reward.mode=grpo,reward.weight=0.1 \
    --variant grpo_0.3:termination.policy=none,reward.mode=grpo,reward.weight=0.3

# 9. Several updates on each batch, at equal tokens, beside higher learning rates with one; and whether cutting helps then.
compare iterations --policies none --seeds 0-2 --budget tokens:100000 \
    --variant n2:termination.policy=none,learner.num_iterations=2 \
    --variant n3:termination.policy=none,learner.num_iterations=3 \
    --variant n5:termination.policy=none,learner.num_iterations=5 \
    --variant lr_1e-3:termination.policy=none,learner.learning_rate=1e-3 \
    --variant lr_2e-3:termination.policy=none,learner.learning_rate=2e-3 \
    --variant n3_lr_1e-3:termination.policy=none,learner.num_iterations=3,learner.learning_rate=1e-3 \
    --variant n3_kat:termination.policy=kat,learner.num_iterations=3

# 10. Smaller batches at equal tokens, with new weights after as many rollouts; and whether cutting helps then.
compare batches --policies none --seeds 0-2 --budget tokens:100000 \
    --variant batch_16:termination.policy=none,learner.batch_size=16,learner.weight_sync_steps=2 \
    --variant batch_8:termination.policy=none,learner.batch_size=8,learner.weight_sync_steps=4 \
    --variant batch_8_kat:termination.policy=kat,learner.batch_size=8,learner.weight_sync_steps=4 \
    --variant batch_8_kat_inverse:termination.policy=kat_inverse,learner.batch_size=8,learner.weight_sync_steps=4
