use burn::module::{ModuleVisitor, Param};
use burn::tensor::{Int, Tensor};
use sha2::{Digest, Sha256};

use super::Fingerprint;
use crate::Linears;

impl Fingerprint {
    /// The fingerprint of a model, from one pass over its parameters.
    ///
    /// Covers all parameters except those of adapters on layers that [`Linears::linears_mut`] lists.
    /// Adapters on other layers are hashed by their parameters only, without their settings.
    pub fn of(model: &impl Linears) -> Self {
        // Adapters are removed from a clone: neither names nor ids decide what is hashed.
        let mut base = model.clone();
        for (_, linear) in base.linears_mut() {
            linear.adapter = None;
        }
        let mut parameters = Parameters {
            hash: Sha256::new(),
            path: Vec::new(),
        };
        let linears = base.linears().into_iter();
        let weights = linears.map(|(path, linear)| (path, &linear.weight));
        for (path, weight) in weights.chain(base.other_weights()) {
            let format = weight.format().map(|format| format.to_string());
            let format = format.as_deref().unwrap_or("dense");
            let dims = weight.dims();
            parameters
                .hash
                .update(format!("{path} {dims:?} {format}\n"));
        }
        base.visit(&mut parameters);
        let digest = parameters.hash.finalize();
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Self(format!("sha256:{hex}"))
    }
}

/// Feeds a hash with the parameters of a module.
struct Parameters {
    hash: Sha256,
    path: Vec<String>,
}

impl Parameters {
    /// Feeds the name and the shape of the parameter at hand.
    fn enter(&mut self, dims: &[usize]) {
        self.hash
            .update(format!("{} {dims:?}\n", self.path.join(".")));
    }
}

impl ModuleVisitor for Parameters {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let values = param.val();
        self.enter(&values.dims());
        let values = values.into_data().convert::<f32>();
        for value in values.as_slice::<f32>().expect("converted to f32") {
            self.hash.update(value.to_le_bytes());
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let values = param.val();
        self.enter(&values.dims());
        let values = values.into_data().convert::<u32>();
        for value in values.as_slice::<u32>().expect("converted to u32") {
            self.hash.update(value.to_le_bytes());
        }
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        // The name of an enum's variant is not a part of a path.
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
