//! Whole runs: the numbers they report and the weights they leave.

use std::time::Duration;

use ferrotune::data::IGNORE;
use ferrotune::engine::{StopReason, evaluate, train};
use serde_json::json;

use crate::support::{
    Listener, Rows, Tiny, VOCABULARY, config, heldout_rows, metrics, run, training_rows,
};

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

#[test]
fn clipped_gradients_move_the_weights_less() {
    let folder = tempfile::tempdir().unwrap();
    let before = Tiny::new().values();
    // A gradient far below eps moves a weight in proportion to itself.
    let moved = |max_grad_norm: f64| {
        let output = folder.path().join(max_grad_norm.to_string());
        let changes = json!({
            "max_grad_norm": max_grad_norm, "eps": 1e-2, "weight_decay": 0.0, "epochs": 1.0,
            "eval_every": 1, "warmup_steps": 0
        });
        let model = Tiny::new();
        let result = run(&config(&output, changes), &model, &mut Listener::default()).unwrap();
        assert_eq!(result.best_step, result.steps);
        let distances = model
            .values()
            .into_iter()
            .zip(&before)
            .map(|(a, b)| (a - b).abs());
        distances.fold(0.0, f32::max)
    };
    let (clipped, free) = (moved(1e-6), moved(0.0));
    assert!(clipped > 0.0 && clipped < 1e-3 * free, "{clipped} {free}");
}
