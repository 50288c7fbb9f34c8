//! Runs that fail: one clear error, and nothing lost.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ferrotune::error::Error;
use serde_json::json;

use crate::support::{Fault, Listener, Tiny, config, metrics, run};

/// Two micro-batches a step: call 9 is the first of step 5.
const CALL: usize = 9;

fn failing(fault: Fault, output: &Path) -> (String, Tiny) {
    let model = Tiny {
        fault,
        // Saving after step 2 makes saving after step 4 wait: until the failure.
        save_pause: Duration::from_millis(200),
        ..Tiny::new()
    };
    let changes = json!({"checkpoint_every": 3, "eval_every": 2});
    match run(&config(output, changes), &model, &mut Listener::default()) {
        Err(Error::Run(message)) => (message, model),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_loss_or_gradient_that_is_not_finite_overwrites_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    let changes = json!({"checkpoint_every": 3, "eval_every": 2});
    let model = Tiny::new();
    run(
        &config(&whole, changes.clone()),
        &model,
        &mut Listener::default(),
    )
    .unwrap();

    // Weights after step 4, which a run that stops there leaves in its checkpoint.
    let output = folder.path().join("four");
    let mut listener = Listener {
        stop_after_step: Some(4),
        ..Listener::default()
    };
    let four = Tiny::new();
    let result = run(&config(&output, changes), &four, &mut listener).unwrap();
    assert_eq!(result.best_step, 4);

    let cases = [
        (Fault::Loss(CALL), "the loss is NaN"),
        (
            Fault::Gradient(CALL + 1),
            "the gradient of head is not finite",
        ),
    ];
    for (number, (fault, part)) in cases.into_iter().enumerate() {
        let output = folder.path().join(number.to_string());
        let (message, failed) = failing(fault, &output);
        assert!(
            message.starts_with("step 5: ") && message.contains(part),
            "{message}"
        );
        assert!(message.contains("learning_rate"), "{message}");
        assert_eq!(failed.bits(), four.bits());
        assert_eq!(metrics(&output).last().unwrap()["step"], 4);
        let saved = fs::read(output.join("adapter/weights")).unwrap();
        let bytes: Vec<u8> = four.values().iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(saved, bytes);

        let again = Tiny::new();
        let changes = json!({"checkpoint_every": 3, "eval_every": 2, "resume": true});
        run(&config(&output, changes), &again, &mut Listener::default()).unwrap();
        assert_eq!(metrics(&output), metrics(&whole));
        assert_eq!(again.bits(), model.bits());
    }
}

#[test]
fn a_parameter_that_the_loss_does_not_reach_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (message, _) = failing(Fault::Detached, &folder.path().join("run"));
    assert!(message.contains("head gets no gradient"), "{message}");
}

#[test]
fn a_broken_checkpoint_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let mut listener = Listener {
        stop_after_step: Some(6),
        ..Listener::default()
    };
    run(&config(&output, json!({})), &Tiny::new(), &mut listener).unwrap();
    let checkpoint = output.join("checkpoint");
    let refusal = || {
        let resume = config(&output, json!({"resume": true}));
        match run(&resume, &Tiny::new(), &mut Listener::default()) {
            Err(Error::Format { path, message }) => (path, message),
            other => panic!("{other:?}"),
        }
    };
    for name in [
        "weights.safetensors",
        "optimizer.safetensors",
        "best.safetensors",
        "state.json",
    ] {
        let path = checkpoint.join(name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 7]).unwrap();
        assert_eq!(refusal().0, path);
        fs::write(&path, whole).unwrap();
    }
    // Weights of one checkpoint with the state of another.
    let path = checkpoint.join("state.json");
    let whole = fs::read_to_string(&path).unwrap();
    fs::write(&path, whole.replacen("\"step\": 6", "\"step\": 5", 1)).unwrap();
    let (path, message) = refusal();
    assert!(
        path.ends_with("weights.safetensors") && message.contains("step 6"),
        "{message}"
    );
}

const CHILD: &str = "FERROTUNE_TEST_FULL_DISK";

/// A disk that takes no more than a few bytes a file, as `ulimit -f` makes one: for the
/// checkpoint's files, not for the short metrics.
#[test]
#[cfg(unix)]
fn a_full_disk_leaves_the_older_checkpoint() {
    if let Some(output) = std::env::var_os(CHILD) {
        let changes = json!({"resume": true, "eval_every": 1000});
        let error = run(
            &config(Path::new(&output), changes),
            &Tiny::new(),
            &mut Listener::default(),
        )
        .unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
        let message = error.to_string();
        assert!(
            message.contains("checkpoint") && message.contains("os error"),
            "{message}"
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    let model = Tiny::new();
    run(&config(&whole, json!({})), &model, &mut Listener::default()).unwrap();
    let output = folder.path().join("run");
    let mut listener = Listener {
        stop_after_step: Some(6),
        ..Listener::default()
    };
    run(&config(&output, json!({})), &Tiny::new(), &mut listener).unwrap();
    let state = fs::read(output.join("checkpoint/state.json")).unwrap();
    let limited = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" --exact failures::a_full_disk_leaves_the_older_checkpoint --nocapture"])
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, &output)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&limited.stdout).into_owned()
        + &String::from_utf8_lossy(&limited.stderr);
    assert!(
        limited.status.success() && said.contains("1 passed"),
        "{said}"
    );
    assert_eq!(
        fs::read(output.join("checkpoint/state.json")).unwrap(),
        state
    );
    let names: Vec<_> = fs::read_dir(&output)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert!(
        !names
            .iter()
            .any(|name| name.to_string_lossy().contains("tmp")),
        "{names:?}"
    );

    let again = Tiny::new();
    run(
        &config(&output, json!({"resume": true})),
        &again,
        &mut Listener::default(),
    )
    .unwrap();
    assert_eq!(metrics(&output), metrics(&whole));
    assert_eq!(again.bits(), model.bits());
}
