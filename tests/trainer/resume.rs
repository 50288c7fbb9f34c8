//! Runs that are stopped, killed and continued.

use std::fs;
use std::path::Path;

use ferrotune::engine::{RunFolder, StopReason, TrainResult, train};
use ferrotune::error::Error;
use serde_json::{Value, json};

use crate::support::{Listener, Tiny, config, heldout_rows, metrics, run, training_rows};

const DROPOUT: f64 = 0.25;

fn timeless(result: &TrainResult) -> Value {
    let mut value = serde_json::to_value(result).unwrap();
    let entries = value.as_object_mut().unwrap();
    assert!(entries.remove("seconds").is_some() && entries.remove("tokens_per_second").is_some());
    value
}

/// Metrics, result and weights of a run that nothing disturbs.
fn unbroken(output: &Path) -> (Vec<Value>, Value, Vec<u32>) {
    let model = Tiny::with_dropout(DROPOUT);
    let result = run(&config(output, json!({})), &model, &mut Listener::default()).unwrap();
    (metrics(output), timeless(&result), model.bits())
}

fn resumed(output: &Path) -> (Vec<Value>, Value, Vec<u32>) {
    let model = Tiny::with_dropout(DROPOUT);
    let config = config(output, json!({"resume": true}));
    let result = run(&config, &model, &mut Listener::default()).unwrap();
    (metrics(output), timeless(&result), model.bits())
}

fn stopped(output: &Path, step: usize) -> Listener {
    let mut listener = Listener {
        stop_after_step: Some(step),
        ..Listener::default()
    };
    let model = Tiny::with_dropout(DROPOUT);
    let result = run(&config(output, json!({})), &model, &mut listener).unwrap();
    assert_eq!(
        (result.stop_reason, result.steps),
        (StopReason::Interrupted, step)
    );
    listener
}

fn killed(output: &Path, step: usize) {
    let mut listener = Listener {
        die_at_step: Some(step),
        ..Listener::default()
    };
    let model = Tiny::with_dropout(DROPOUT);
    let error = run(&config(output, json!({})), &model, &mut listener).unwrap_err();
    assert_eq!(error.to_string(), "killed");
    assert_eq!(metrics(output).last().unwrap()["step"], step);
}

#[test]
fn a_stopped_run_goes_on_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let expected = unbroken(&folder.path().join("unbroken"));
    // Step 7 ends the first epoch; 4 and 8 are due an evaluation, 5 and 10 a checkpoint.
    for step in [1, 4, 5, 6, 7, 8, 10, 13, 20, 21] {
        let output = folder.path().join(format!("stopped at {step}"));
        let listener = stopped(&output, step);
        let names: Vec<&Value> = listener.events.iter().map(|e| &e["event"]).collect();
        let end = names
            .iter()
            .rposition(|name| *name == "checkpoint")
            .unwrap();
        assert_eq!(listener.events[end]["step"], step);
        assert_eq!(names.last().unwrap().as_str(), Some("stop"));
        assert_eq!(listener.events.last().unwrap()["reason"], "interrupted");
        assert_eq!(resumed(&output), expected, "stopped at {step}");
    }
}

#[test]
fn a_killed_run_goes_on_from_its_last_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let expected = unbroken(&folder.path().join("unbroken"));
    for step in [6, 9, 14, 19] {
        let output = folder.path().join(format!("killed at {step}"));
        killed(&output, step);
        // The kill tears the line it was writing.
        let path = output.join("metrics.jsonl");
        let text = fs::read_to_string(&path).unwrap() + "{\"event\":\"st";
        fs::write(&path, text).unwrap();
        assert_eq!(resumed(&output), expected, "killed at {step}");
    }
}

#[test]
fn a_run_killed_before_its_first_checkpoint_begins_again() {
    let folder = tempfile::tempdir().unwrap();
    let expected = unbroken(&folder.path().join("unbroken"));
    for step in [1, 4] {
        let output = folder.path().join(format!("killed at {step}"));
        killed(&output, step);
        let message = refusal(json!({"resume": true}), &output);
        assert!(message.contains("no checkpoint to resume"), "{message}");
        // What a process that is gone leaves behind.
        fs::write(output.join(".lock"), "").unwrap();
        assert_eq!(resumed(&output), expected, "killed at {step}");
        assert!(!output.join(".lock").exists());
    }
}

#[test]
fn a_run_survives_being_stopped_again_and_again() {
    let folder = tempfile::tempdir().unwrap();
    let expected = unbroken(&folder.path().join("unbroken"));
    let output = folder.path().join("run");
    stopped(&output, 2);
    for step in [3, 9, 16] {
        let mut listener = Listener {
            stop_after_step: Some(step),
            ..Listener::default()
        };
        let config = config(&output, json!({"resume": true}));
        run(&config, &Tiny::with_dropout(DROPOUT), &mut listener).unwrap();
        assert_eq!(
            listener.named("step")[0]["step"].as_u64().unwrap() as usize,
            [3, 4, 10][[3, 9, 16].iter().position(|&s| s == step).unwrap()]
        );
    }
    assert_eq!(resumed(&output), expected);
}

#[test]
fn an_interrupted_evaluation_is_made_up_for() {
    let folder = tempfile::tempdir().unwrap();
    let expected = unbroken(&folder.path().join("unbroken"));
    let mut interruptions = 0;
    for poll in 1..=14 {
        let output = folder.path().join(format!("poll {poll}"));
        let mut listener = Listener {
            interrupt_at_poll: Some(poll),
            ..Listener::default()
        };
        let config = config(&output, json!({}));
        let result = run(&config, &Tiny::with_dropout(DROPOUT), &mut listener).unwrap();
        assert_eq!(result.stop_reason, StopReason::Interrupted);
        interruptions += usize::from(result.steps.is_multiple_of(4));
        assert_eq!(resumed(&output), expected, "interrupted at poll {poll}");
    }
    assert!(interruptions > 2, "no evaluation was interrupted");
}

#[test]
fn a_crash_between_the_renames_leaves_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let expected = unbroken(&folder.path().join("unbroken"));
    let leave = |name: &str, crash: &dyn Fn(&Path)| {
        let output = folder.path().join(name);
        stopped(&output, 8);
        crash(&output);
        assert_eq!(resumed(&output), expected, "{name}");
        for entry in fs::read_dir(&output).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(
                ["adapter", "checkpoint", "metrics.jsonl"].contains(&name.as_str()),
                "{name}"
            );
        }
    };
    let half = |output: &Path| {
        fs::create_dir(output.join("checkpoint.tmp-1")).unwrap();
        fs::write(output.join("checkpoint.tmp-1/weights.safetensors"), "torn").unwrap();
    };
    leave("while writing", &half);
    leave("after the old one went aside", &|output| {
        half(output);
        fs::rename(output.join("checkpoint"), output.join("checkpoint.old")).unwrap();
    });
    leave("before the old one was removed", &|output| {
        fs::create_dir(output.join("checkpoint.old")).unwrap();
        fs::write(output.join("checkpoint.old/state.json"), "older").unwrap();
    });
}

fn refusal(changes: Value, output: &Path) -> String {
    let mut changes = changes;
    changes["resume"] = json!(true);
    let model = Tiny::with_dropout(DROPOUT);
    match run(&config(output, changes), &model, &mut Listener::default()) {
        Err(Error::Argument(message)) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_run_goes_on_only_as_it_began() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    stopped(&output, 6);
    let before = fs::read(output.join("checkpoint/state.json")).unwrap();
    let message = refusal(json!({"learning_rate": 0.01, "beta2": 0.5}), &output);
    assert!(
        message.contains("learning_rate was 0.05 and is now 0.01"),
        "{message}"
    );
    assert!(
        message.contains("beta2 was 0.99 and is now 0.5"),
        "{message}"
    );
    let message = refusal(json!({"epochs": 9.0}), &output);
    assert!(message.contains("21 steps long and is now 63"), "{message}");

    let resume = config(&output, json!({"resume": true}));
    let refuse = |model: &Tiny, rows, heldout| {
        let hooks = &mut Listener::default();
        train(&resume, model, &rows, &heldout, hooks)
            .unwrap_err()
            .to_string()
    };
    let mut other = training_rows();
    other.rows[5].0[3] ^= 1;
    let message = refuse(&Tiny::new(), other, heldout_rows());
    assert!(
        message.contains("training data is not the same"),
        "{message}"
    );
    let mut other = heldout_rows();
    other.rows[5].0[3] ^= 1;
    let message = refuse(&Tiny::new(), training_rows(), other);
    assert!(
        message.contains("held-out data is not the same"),
        "{message}"
    );
    let mut model = Tiny::with_dropout(DROPOUT);
    model.base = 0.02;
    let message = refuse(&model, training_rows(), heldout_rows());
    assert!(message.contains("base model is not the one"), "{message}");
    assert_eq!(
        fs::read(output.join("checkpoint/state.json")).unwrap(),
        before
    );

    // Where a run looks and ends is free.
    let changes = json!({"resume": true, "eval_every": 3, "checkpoint_every": 2, "patience": 50, "max_seconds": 1e6, "model": "moved", "threads": 1});
    run(
        &config(&output, changes),
        &Tiny::with_dropout(DROPOUT),
        &mut Listener::default(),
    )
    .unwrap();
}

#[test]
fn a_folder_is_never_written_over() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let message = refusal(json!({}), &output);
    assert!(message.contains("no checkpoint to resume"), "{message}");
    assert!(!output.exists());

    fs::create_dir(&output).unwrap();
    fs::write(output.join("notes.txt"), "mine").unwrap();
    let fresh = config(&output, json!({}));
    let refuse = || {
        run(&fresh, &Tiny::new(), &mut Listener::default())
            .unwrap_err()
            .to_string()
    };
    let message = refuse();
    assert!(
        message.contains("not empty (notes.txt); name another folder"),
        "{message}"
    );
    fs::remove_file(output.join("notes.txt")).unwrap();

    let held = RunFolder::open(&output, false).unwrap();
    let message = refuse();
    assert!(message.contains("in use by another run"), "{message}");
    drop(held);
    assert_eq!(fs::read_dir(&output).unwrap().count(), 0);

    stopped(&output, 3);
    let message = refuse();
    assert!(
        message.contains("not empty") && message.contains("resume"),
        "{message}"
    );
}
