//! Gradient accumulation weights tokens, not micro-batches.

use ferrotune::data::BatchSource;
use ferrotune::engine::{Gradients, Mode, Model, train};
use serde_json::json;

use crate::support::{Listener, Rows, Tiny, config, heldout_rows, metrics};

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
