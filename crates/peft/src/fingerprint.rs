use std::fmt;

use serde::{Deserialize, Serialize};

// Apart from the type, which errors name: the walk through a model knows layers, and they errors.
mod parameters;

/// The SHA-256 of a model's parameters with their names, and of its layers' formats, without adapters.
///
/// Two models of one architecture and one configuration with one fingerprint give the same bits.
///
/// # Examples
/// ```
/// # use burn::tensor::{Device, Tensor};
/// # use peft::{Fingerprint, Linear, Linears, Lora, Weight};
/// # #[derive(burn::module::Module, Debug)]
/// # struct Mlp {
/// #     up: Linear,
/// # }
/// # impl Linears for Mlp {
/// #     fn linears(&self) -> Vec<(String, &Linear)> {
/// #         vec![("up".into(), &self.up)]
/// #     }
/// #     fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
/// #         vec![("up".into(), &mut self.up)]
/// #     }
/// # }
/// let weight = |value: f32| Weight::frozen(Tensor::full([4, 4], value, &Device::flex()));
/// let mut mlp = Mlp {
///     up: Linear::new(weight(1.0), None),
/// };
/// let base = Fingerprint::of(&mlp);
/// peft::attach(&mut mlp, &Lora::new(2))?;
/// assert_eq!(Fingerprint::of(&mlp), base);
/// mlp.up = Linear::new(weight(1.5), None);
/// assert_ne!(Fingerprint::of(&mlp), base);
/// # Ok::<(), peft::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(String);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}
