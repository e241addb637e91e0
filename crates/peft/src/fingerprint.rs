use std::fmt;

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Linears, Weight};

/// SHA-256 of the paths, formats and numbers of a model's projections, adapters left out.
///
/// Two models with one fingerprint have bit-equal projections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(String);

impl Fingerprint {
    /// The fingerprint of a model, from one pass over its projections.
    pub fn of(model: &impl Linears) -> Self {
        let mut hash = Sha256::new();
        for (path, linear) in model.linears() {
            let dims = linear.weight.dims();
            match &linear.weight {
                Weight::Dense(weight) => {
                    hash.update(format!("{path} {dims:?} dense\n"));
                    update(&mut hash, weight.val());
                }
                Weight::Quant(weight) => {
                    hash.update(format!("{path} {dims:?} {}\n", weight.format()));
                    let parts = weight.to_parts();
                    parts
                        .columns
                        .iter()
                        .for_each(|word| hash.update(word.to_le_bytes()));
                    update(&mut hash, weight.scales());
                    if let Some(zeros) = weight.zeros() {
                        update(&mut hash, zeros);
                    }
                }
            }
            if let Some(bias) = linear.bias() {
                hash.update("bias\n");
                update(&mut hash, bias);
            }
        }
        let hex = hash
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>();
        Self(format!("sha256:{hex}"))
    }
}

fn update<const D: usize>(hash: &mut Sha256, values: Tensor<D>) {
    let values = values.into_data().convert::<f32>();
    for value in values.as_slice::<f32>().expect("converted to f32") {
        hash.update(value.to_le_bytes());
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}
