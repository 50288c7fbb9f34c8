//! Bottleneck adapters: `A(z) = act(z·Dᵀ + bias_D)·Uᵀ + bias_U`, with D `[b, k]` and U `[k, b]`.
//!
//! Houlsby et al. (2019) add A to what attention and MLP put out, before the residual sum:
//! `y' = y + A(y)`. Pfeiffer et al. (2021), as AdapterHub defines it, add A behind the MLP alone, to
//! the residual sum s = x + y: `s' = s + A(s)` where the norms come before the blocks, and
//! `s' = s + A(norm(s))`, normed again, where they come after.

use super::block::Inner;
use super::builder::Builder;
use crate::adapter::{TunedConfig, Variant};
use crate::error::Result;
use crate::lora::{Base, Group, Member};
use crate::scratch::Scratch;
use crate::simd::exp;

/// What a bottleneck adapter stands behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behind {
    Attention,
    Mlp,
}

/// One adapter; its tensors are trained, D and its bias before U and its bias.
#[derive(Debug)]
pub struct Bottleneck {
    pub variant: Variant,
    pub down: Group,
    pub up: Group,
}

/// What backward needs of forward.
pub struct BottleneckSaved {
    z: Scratch,
    down: Scratch,
}

impl Bottleneck {
    pub fn theta_len(&self) -> usize {
        self.down.theta_len() + self.up.theta_len()
    }

    /// Whether it stands behind the residual sum.
    pub fn is_on_sum(&self) -> bool {
        self.variant == Variant::Pfeiffer
    }

    /// Adds A(z) to `out`, for `z` and `out` `[m, k]`.
    pub fn add(&self, z: Scratch, theta: &[f32], out: &mut [f32]) -> Result<BottleneckSaved> {
        let (theta_down, theta_up) = theta.split_at(self.down.theta_len());
        let (down, _) = self.down.forward(&z, theta_down, None)?;
        let (up, _) = self.up.forward(&self.activated(&down), theta_up, None)?;
        for (out, up) in out.iter_mut().zip(up.iter()) {
            *out += up;
        }
        Ok(BottleneckSaved { z, down })
    }

    /// The gradient of z, for that of A(z); writes `dtheta`.
    pub fn backward(
        &self,
        saved: &BottleneckSaved,
        theta: &[f32],
        d_up: &[f32],
        dtheta: &mut [f32],
    ) -> Result<Scratch> {
        let (theta_down, theta_up) = theta.split_at(self.down.theta_len());
        let (dtheta_down, dtheta_up) = dtheta.split_at_mut(self.down.theta_len());
        let mut d_down = Scratch::dirty(saved.down.len());
        let hidden = self.activated(&saved.down);
        let d_hidden = Some(&mut d_down[..]);
        self.up
            .backward(&hidden, theta_up, &[], d_up, None, d_hidden, dtheta_up)?;
        for (d, &x) in d_down.iter_mut().zip(saved.down.iter()) {
            *d *= self.slope(x);
        }
        let mut dz = Scratch::dirty(saved.z.len());
        let into = Some(&mut dz[..]);
        self.down
            .backward(&saved.z, theta_down, &[], &d_down, None, into, dtheta_down)?;
        Ok(dz)
    }

    /// AdapterHub's: swish in Houlsby's adapters, ReLU in Pfeiffer's.
    fn activated(&self, x: &[f32]) -> Scratch {
        let mut y = Scratch::dirty(x.len());
        for (y, &x) in y.iter_mut().zip(x) {
            *y = match self.variant {
                Variant::Houlsby => x * sigmoid(x),
                Variant::Pfeiffer => x.max(0.0),
            };
        }
        y
    }

    fn slope(&self, x: f32) -> f32 {
        match self.variant {
            Variant::Houlsby => {
                let s = sigmoid(x);
                s * (1.0 + x * (1.0 - s))
            }
            Variant::Pfeiffer => f32::from(x > 0.0),
        }
    }
}

/// `y` of a block added to the residual `x`, both `[m, k]`, with the block's adapter where it has one
/// and its norm comes before it. `theta` is the block's flat variable.
pub fn add_residual<I: Inner>(
    inner: &I,
    theta: &[f32],
    x: &mut [f32],
    mut y: Scratch,
) -> Result<()> {
    let own = |one: &Bottleneck| &theta[inner.theta_len()..][..one.theta_len()];
    let adapter = inner.bottleneck();
    if let Some(one) = adapter.filter(|one| !one.is_on_sum()) {
        one.add(copy(&y), own(one), &mut y)?;
    }
    for (x, y) in x.iter_mut().zip(y.iter()) {
        *x += y;
    }
    if let Some(one) = adapter.filter(|one| one.is_on_sum()) {
        one.add(copy(x), own(one), x)?;
    }
    Ok(())
}

pub fn copy(values: &[f32]) -> Scratch {
    let mut copied = Scratch::dirty(values.len());
    copied.copy_from_slice(values);
    copied
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

impl Builder<'_> {
    /// The adapter behind a block named `block`, where there is one.
    pub fn bottleneck(&self, block: &str, behind: Behind) -> Option<Bottleneck> {
        let Some(TunedConfig::Bottleneck(config)) = self.beside() else {
            return None;
        };
        if config.variant == Variant::Pfeiffer && behind == Behind::Attention {
            return None;
        }
        let (k, b) = (self.architecture.hidden_size, config.bottleneck_size);
        let group = |part: &str, k: usize, n: usize| Group {
            k,
            members: vec![Member {
                name: format!("{block}.adapter.{part}"),
                n,
                adapter: None,
                scaled: None,
            }],
            base: Base::Trained { biases: vec![true] },
        };
        Some(Bottleneck {
            variant: config.variant,
            down: group("down", k, b),
            up: group("up", b, k),
        })
    }
}
