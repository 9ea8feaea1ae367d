#!/usr/bin/env bash
# The experiments on whether cutting helps. What is done already is not done again, so it may be interrupted. Tables and
# plots are copied to docs/evidence/.
set -euo pipefail
cd "$(dirname "$0")/../.."

katana=.venv/bin/katana
demo=ops/experiments/demo.yaml
runs=runs/evidence
out=docs/evidence
seeds=0-4
all=none,fixed,scheduled,random,random_matched,kat,kat_absolute,kat_inverse

# 60 steps are enough to tell the policies apart; 192 problems halve the noise of the demo's own evaluation.
common=(
    --set runs_dir=$runs --set learner.max_steps=60 --set eval.every_steps=20 --set eval.problems=192
    --set termination.fixed_tokens=64 --set termination.scheduled_tokens=128 --set termination.scheduled_steps=60
    --set termination.floor_nats=0.05
)
in_tokens=()
for one in "${common[@]}"; do
    [ "$one" = learner.max_steps=60 ] && unset 'in_tokens[-1]' || in_tokens+=("$one")
done

keep() { # grid or file in runs/evidence, name in docs/evidence
    mkdir -p $out
    for kind in csv md png; do
        [ ! -f "$runs/$1.$kind" ] || cp "$runs/$1.$kind" "$out/$2.$kind"
    done
}

compare() { # name, options
    local name=$1
    shift
    $katana compare $demo --name "$name" "$@"
    keep "$name/compare" "$name"
}

# 1. All policies: the same steps, then the same generated tokens.
compare steps --policies $all --seeds $seeds "${common[@]}"
compare tokens --policies $all --seeds $seeds --budget tokens:180000 "${in_tokens[@]}"

# 2. Does the threshold ratchet? Long runs, three calibrations.
compare calibration --policies kat --seeds 0-2 "${common[@]}" --set learner.max_steps=150 --set eval.every_steps=50 \
    --variant completed:termination.calibrate_on=completed --variant everything:termination.calibrate_on=all

# 3. A student that ends with another token than its teacher: STOP as one event, and token by token.
[ -f $runs/models/student/config.json ] || $katana pretrain --exchange-end ops/models/student --out $runs/models/student
compare stop-set --policies none --seeds 0-2 "${common[@]}" --set student.model=$runs/models/student \
    --variant by_token:termination.policy=none,rollout.stop_set=student

# 4. A teacher that hardly leaves a loop: traps.
[ -f $runs/models/teacher/config.json ] || $katana pretrain --which teacher --leave-loop 0.02 --out $runs/models
compare traps --policies none,fixed,random,random_matched,kat --seeds $seeds "${common[@]}" \
    --set teacher.model=$runs/models/teacher

# 5. Other settings, from runs that cut nothing; and whether what was cut could still have been right.
for task in shadow:ops/models/teacher shadow-traps:$runs/models/teacher; do
    name=${task%%:*}
    [ -f $runs/"$name"/summary.json ] || $katana run $demo --name "$name" "${common[@]}" --fresh \
        --set termination.shadow=true --set teacher.model="${task#*:}"
    $katana replay $runs/"$name" --sweep termination.eta=0.2,0.4,0.6,0.8,0.9 --sweep termination.window=8,16,32
    keep "$name/replay/replay" "replay-$name"
done
for run in steps/kat-s0 steps/random_matched-s0 steps/kat_inverse-s0 traps/kat-s0 traps/random_matched-s0; do
    $katana audit $runs/$run --student ops/models/student
    keep "$run/audit/audit" "audit-${run//\//-}"
done
