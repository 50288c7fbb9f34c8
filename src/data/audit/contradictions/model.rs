//! Multinomial logistic regression on sparse features, trained by AdaGrad (Duchi, Hazan and Singer 2011).

use super::features::Features;

const EPOCHS: usize = 8;
const LEARNING_RATE: f32 = 0.3;
/// AdaGrad's sum of squares before the first step.
const BEGIN: f32 = 1e-2;

pub struct Model {
    classes: usize,
    /// `[place, class]`.
    weights: Vec<f32>,
    squares: Vec<f32>,
    bias: Vec<f32>,
    bias_squares: Vec<f32>,
}

impl Model {
    /// Trains on texts with their classes (below `classes`), in this order of each epoch.
    pub fn train(
        examples: &[(&Features, usize)],
        places: u32,
        classes: usize,
        order: impl Fn(usize) -> Vec<u32>,
    ) -> Self {
        let size = places as usize * classes;
        let mut model = Self {
            classes,
            weights: vec![0.0; size],
            squares: vec![BEGIN; size],
            bias: vec![0.0; classes],
            bias_squares: vec![BEGIN; classes],
        };
        let mut gradient = vec![0.0; classes];
        for epoch in 0..EPOCHS {
            for index in order(epoch) {
                let (features, class) = examples[index as usize];
                model.predict(features, &mut gradient);
                gradient[class] -= 1.0;
                model.step(features, &gradient);
            }
        }
        model
    }

    /// The probability of each class.
    pub fn predict(&self, features: &Features, into: &mut [f32]) {
        into.copy_from_slice(&self.bias);
        for &(place, value) in features {
            let start = place as usize * self.classes;
            let weights = &self.weights[start..start + self.classes];
            for (sum, weight) in into.iter_mut().zip(weights) {
                *sum += value * weight;
            }
        }
        let most = into.iter().copied().fold(f32::MIN, f32::max);
        let mut sum = 0.0;
        for value in into.iter_mut() {
            *value = (*value - most).exp();
            sum += *value;
        }
        for value in into {
            *value /= sum;
        }
    }

    fn step(&mut self, features: &Features, gradient: &[f32]) {
        let update = |weight: &mut f32, square: &mut f32, slope: f32| {
            *square += slope * slope;
            *weight -= LEARNING_RATE * slope / square.sqrt();
        };
        for &(place, value) in features {
            let start = place as usize * self.classes;
            let range = start..start + self.classes;
            let weights = self.weights[range.clone()].iter_mut();
            for ((weight, square), slope) in weights.zip(&mut self.squares[range]).zip(gradient) {
                update(weight, square, slope * value);
            }
        }
        for ((weight, square), slope) in self
            .bias
            .iter_mut()
            .zip(&mut self.bias_squares)
            .zip(gradient)
        {
            update(weight, square, *slope);
        }
    }
}
