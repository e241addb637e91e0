use std::fmt;

use burn::module::{ModuleVisitor, Param};
use burn::tensor::{Int, Tensor};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Linears;

/// SHA-256 of a model's parameters with their names and of its layers' formats, adapters left out.
///
/// Two models of one architecture and one configuration with one fingerprint give the same bits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(String);

impl Fingerprint {
    /// The fingerprint of a model, from one pass over its parameters.
    pub fn of(model: &impl Linears) -> Self {
        let mut parameters = Parameters {
            hash: Sha256::new(),
            path: Vec::new(),
        };
        let linears = model.linears().into_iter();
        let weights = linears.map(|(path, linear)| (path, &linear.weight));
        for (path, weight) in weights.chain(model.other_weights()) {
            let format = weight.format().map(|format| format.to_string());
            let format = format.as_deref().unwrap_or("dense");
            let dims = weight.dims();
            parameters
                .hash
                .update(format!("{path} {dims:?} {format}\n"));
        }
        model.visit(&mut parameters);
        let digest = parameters.hash.finalize();
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Self(format!("sha256:{hex}"))
    }
}

/// Feeds a hash with the parameters that belong to no adapter.
struct Parameters {
    hash: Sha256,
    path: Vec<String>,
}

impl Parameters {
    /// Whether the parameter at hand counts. Its name is fed first.
    fn enter(&mut self, dims: &[usize]) -> bool {
        // The field of `Linear`.
        if self.path.iter().any(|name| name == "adapter") {
            return false;
        }
        self.hash
            .update(format!("{} {dims:?}\n", self.path.join(".")));
        true
    }
}

impl ModuleVisitor for Parameters {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let values = param.val();
        if self.enter(&values.dims()) {
            let values = values.into_data().convert::<f32>();
            for value in values.as_slice::<f32>().expect("converted to f32") {
                self.hash.update(value.to_le_bytes());
            }
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let values = param.val();
        if self.enter(&values.dims()) {
            let values = values.into_data().convert::<u32>();
            for value in values.as_slice::<u32>().expect("converted to u32") {
                self.hash.update(value.to_le_bytes());
            }
        }
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        // What the variants of an enum are called says nothing about a model.
        if !is_enum(container) {
            self.path.push(name.into());
        }
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        if !is_enum(container) {
            self.path.pop();
        }
    }
}

fn is_enum(container: &str) -> bool {
    container.starts_with("Enum")
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}
