//! Whole runs: the numbers they report and the weights they leave.

use std::time::Duration;

use ferrotune::data::{BatchSource, IGNORE};
use ferrotune::engine::{Gradients, Mode, Model, StopReason, evaluate, train};
use serde_json::json;

use crate::support::{
    Listener, Rows, Tiny, VOCABULARY, config, heldout_rows, metrics, run, training_rows,
};

/// Eight rows as one micro-batch, or as four of two with very different numbers of targets.
fn cut(batch_size: usize) -> Rows {
    Rows {
        batch_size,
        shuffle: false,
        ..Rows::new(24, 8, 1, 21)
    }
}

#[test]
fn accumulated_gradients_are_those_of_one_large_batch() {
    // The frozen shift makes some rows much harder than others.
    let model = Tiny {
        base: 0.3,
        ..Tiny::new()
    };
    let gradients = |rows: &Rows, count| {
        let mut gradients = Gradients::new(model.parameters());
        let mut means = Vec::new();
        let (mut sum, mut targets) = (0.0, 0);
        for index in 0..count {
            let batch = rows.batch(0, index).unwrap();
            let (loss, n) = model.loss(&batch, Mode::Train { seed: 0 }).unwrap();
            let value = f64::from(loss.to_scalar::<f32>().unwrap());
            means.push(value / n as f64);
            sum += value;
            targets += n;
            gradients
                .add(model.parameters(), &mut loss.backward().unwrap())
                .unwrap();
        }
        gradients.check_complete().unwrap();
        let mean_of_means = means.iter().sum::<f64>() / means.len() as f64;
        (gradients, sum / targets as f64, mean_of_means)
    };
    let (whole, loss, _) = gradients(&cut(8), 1);
    let (parts, accumulated, mean_of_means) = gradients(&cut(2), 4);
    assert!((loss - accumulated).abs() < 1e-6, "{loss} {accumulated}");
    assert!(
        (loss - mean_of_means).abs() > 1e-3,
        "the cuts hold equally many targets"
    );
    for (a, b) in whole
        .sums()
        .iter()
        .flatten()
        .zip(parts.sums().iter().flatten())
    {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
    assert!(whole.norm().unwrap() > 1.0);
}

#[test]
fn four_batches_of_two_train_like_one_of_eight() {
    let folder = tempfile::tempdir().unwrap();
    let train_with = |batch_size: usize, accumulation: usize, name: &str| {
        let output = folder.path().join(name);
        let changes = json!({"batch_size": batch_size, "gradient_accumulation": accumulation});
        let config = config(&output, changes);
        let model = Tiny::new();
        train(
            &config,
            &model,
            &cut(batch_size),
            &heldout_rows(),
            &mut Listener::default(),
        )
        .unwrap();
        (metrics(&output), model.values())
    };
    let (one, weights) = train_with(8, 1, "one");
    let (four, accumulated) = train_with(2, 4, "four");
    assert_eq!(one.len(), four.len());
    for (a, b) in one.iter().zip(&four) {
        for name in ["loss", "learning_rate", "grad_norm"] {
            let (a, b) = (a[name].as_f64(), b[name].as_f64());
            assert_eq!(a.is_some(), b.is_some());
            let (a, b) = (a.unwrap_or(0.0), b.unwrap_or(0.0));
            assert!((a - b).abs() < 1e-5, "{name}: {a} {b}");
        }
        assert_eq!(a["tokens"], b["tokens"]);
    }
    for (a, b) in weights.iter().zip(&accumulated) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
}

#[test]
fn one_seed_gives_one_run_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let with_seed = |seed: u64, name: &str| {
        let output = folder.path().join(name);
        let model = Tiny::with_dropout(0.3);
        run(
            &config(&output, json!({"seed": seed})),
            &model,
            &mut Listener::default(),
        )
        .unwrap();
        (metrics(&output), model.bits())
    };
    let first = with_seed(11, "first");
    assert_eq!(first, with_seed(11, "second"));
    assert_ne!(first.1, with_seed(12, "third").1);
}

#[test]
fn a_run_reports_learns_and_keeps_its_best() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let model = Tiny::new();
    let mut listener = Listener::default();
    let result = run(&config(&output, json!({})), &model, &mut listener).unwrap();
    // 53 rows in 14 micro-batches of 4, 3 epochs, 2 micro-batches a step.
    assert_eq!(
        (result.steps, result.stop_reason),
        (21, StopReason::Finished)
    );
    assert!(
        result.heldout_loss_best < result.heldout_loss_before - 0.5,
        "{result:?}"
    );
    assert!((result.heldout_loss_before - (VOCABULARY as f64).ln()).abs() < 0.2);

    let steps = listener.named("step");
    assert_eq!(steps.len(), 21);
    assert_eq!(steps[0]["learning_rate"], 0.0);
    assert_eq!(steps[3]["learning_rate"], 0.05);
    assert_eq!(steps[20]["total_steps"], 21);
    assert_eq!(steps[20]["tokens"].as_u64(), Some(result.tokens));
    assert!(steps[20]["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert!(steps[3]["remaining_seconds"].as_f64().unwrap() > 0.0);
    let evaluated: Vec<u64> = listener
        .named("eval")
        .iter()
        .map(|e| e["step"].as_u64().unwrap())
        .collect();
    assert_eq!(evaluated, [0, 4, 8, 12, 16, 20, 21]);
    for event in listener.named("eval") {
        assert_eq!(event["tokens"], 100);
        let perplexity = event["loss"].as_f64().unwrap().exp();
        assert!((event["perplexity"].as_f64().unwrap() - perplexity).abs() < 1e-9);
    }
    let saved: Vec<u64> = listener
        .named("checkpoint")
        .iter()
        .map(|e| e["step"].as_u64().unwrap())
        .collect();
    assert_eq!(saved, [5, 10, 15, 20, 21]);
    let stop =
        json!({"event": "stop", "reason": "finished", "step": 21, "best_step": result.best_step});
    assert_eq!(listener.events.last(), Some(&stop));
    let measured = listener
        .events
        .iter()
        .filter(|e| e["event"] == "step" || e["event"] == "eval");
    let text = std::fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert!(
        measured.eq(&lines),
        "metrics.jsonl is not what the hooks heard"
    );
    let found = evaluate(&model, &heldout_rows(), 100, || Ok(true))
        .unwrap()
        .unwrap();
    assert_eq!(found.loss.to_bits(), result.heldout_loss_best.to_bits());
}

/// Half of the held-out text contradicts the training text: its loss falls, then rises.
fn contradicting() -> Rows {
    let mut rows = heldout_rows();
    rows.rows.truncate(6);
    rows.rows.extend(Rows::new(3, 4, 9, 77).rows);
    rows
}

#[test]
fn early_stopping_keeps_the_best_weights() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let changes = json!({
        "epochs": 200.0, "schedule": "constant", "eval_every": 2, "eval_tokens": 10_000,
        "patience": 3, "weight_decay": 0.0, "learning_rate": 0.1
    });
    let model = Tiny::new();
    let mut listener = Listener::default();
    let config = config(&output, changes);
    let result = train(
        &config,
        &model,
        &training_rows(),
        &contradicting(),
        &mut listener,
    )
    .unwrap();
    assert_eq!(result.stop_reason, StopReason::EarlyStopping);
    assert!(result.best_step > 0, "{result:?}");
    assert_eq!(result.steps, result.best_step + 3 * 2);
    assert!(result.heldout_loss_last > result.heldout_loss_best);
    let losses = listener
        .named("eval")
        .into_iter()
        .map(|e| e["loss"].as_f64().unwrap());
    assert!((losses.fold(f64::INFINITY, f64::min) - result.heldout_loss_best).abs() < f64::EPSILON);

    let found = evaluate(&model, &contradicting(), 10_000, || Ok(true))
        .unwrap()
        .unwrap();
    assert_eq!(found.loss.to_bits(), result.heldout_loss_best.to_bits());
    let saved = std::fs::read(output.join("adapter/weights")).unwrap();
    let bytes: Vec<u8> = model
        .values()
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    assert_eq!(saved, bytes);
}

#[test]
fn a_time_budget_ends_the_run_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let changes = json!({"max_steps": 100_000, "max_seconds": 1.5, "eval_every": 1000});
    let model = Tiny {
        pause: Duration::from_millis(20),
        ..Tiny::new()
    };
    let output = folder.path().join("run");
    let result = run(&config(&output, changes), &model, &mut Listener::default()).unwrap();
    assert_eq!(result.stop_reason, StopReason::MaxSeconds);
    assert!((1..1000).contains(&result.steps));
    assert!(result.seconds < 3.0, "{result:?}");
    assert!(result.heldout_loss_best < result.heldout_loss_before);
}

#[test]
fn max_steps_replaces_epochs_and_the_data_begins_again() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let changes = json!({"max_steps": 30, "warmup_steps": 50});
    let mut listener = Listener::default();
    let result = run(&config(&output, changes), &Tiny::new(), &mut listener).unwrap();
    assert_eq!(result.steps, 30);
    let warning = listener.named("warning")[0]["message"].as_str().unwrap();
    assert!(warning.contains("warmup_steps is 50"), "{warning}");
}

#[test]
fn batches_without_targets_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut rows = Rows {
        shuffle: false,
        ..training_rows()
    };
    // Step 2 reads rows 8 to 15.
    for (_, targets) in &mut rows.rows[8..16] {
        targets.fill(IGNORE);
    }
    let output = folder.path().join("run");
    let changes = json!({"epochs": 1.0, "warmup_steps": 0});
    let mut listener = Listener::default();
    train(
        &config(&output, changes),
        &Tiny::new(),
        &rows,
        &heldout_rows(),
        &mut listener,
    )
    .unwrap();
    let steps: Vec<u64> = listener
        .named("step")
        .iter()
        .map(|e| e["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [1, 3, 4, 5, 6, 7]);
}
