use burn::module::{ModuleVisitor, Param};
use burn::tensor::{Bool, DType, Int, Tensor, TensorData};
use sha2::{Digest, Sha256};

use super::{Fingerprint, Others, Running};
use crate::Linears;

impl Fingerprint {
    /// The fingerprint of a model, from one pass over its parameters.
    ///
    /// Covers all parameters except those of adapters on layers that [`Linears::linears_mut`] lists, and
    /// what [`Linears::identity`] states. Adapters on other layers are hashed by their parameters only,
    /// without their settings.
    pub fn of(model: &impl Linears) -> Self {
        // Adapters are removed from a clone: neither names nor ids decide what is hashed.
        let mut base = model.clone();
        for (_, linear) in base.linears_mut() {
            linear.adapter = None;
        }
        let mut parameters = Parameters {
            values: Sha256::new(),
            structure: Sha256::new(),
            path: Vec::new(),
            running: Running::default(),
        };
        let linears = base.linears().into_iter();
        let weights = linears.map(|(path, linear)| (path, &linear.weight));
        for (path, weight) in weights.chain(base.other_weights()) {
            let format = weight.format().map(|format| format.to_string());
            let format = format.as_deref().unwrap_or("dense");
            let dims = weight.dims();
            parameters
                .values
                .update(format!("{path} {dims:?} {format}\n"));
        }
        parameters.mark("the formats of the layers".into());
        base.visit(&mut parameters);
        Self {
            parameters: text(parameters.values),
            others: Some(Box::new(Others {
                structure: text(parameters.structure),
                identity: base.identity(),
                running: Some(parameters.running),
            })),
        }
    }
}

fn text(hash: Sha256) -> String {
    let hex = hash
        .finalize()
        .into_iter()
        .map(|byte| format!("{byte:02x}"));
    format!("sha256:{}", hex.collect::<String>())
}

/// Feeds two hashes with the parameters of a module.
///
/// A parameter is hashed by its values, not by the type in which a device holds them: floats as `f32`,
/// integers as `u32`. What these do not hold goes to the structure, so that the digest of other
/// parameters stays that of older versions.
struct Parameters {
    values: Sha256,
    structure: Sha256,
    path: Vec<String>,
    running: Running,
}

impl Parameters {
    /// Keeps the beginning of the digest of all values so far.
    fn mark(&mut self, name: String) {
        self.running.push(name, &self.values.clone().finalize());
    }

    /// The name and the shape of the parameter at hand.
    fn entry(&self, dims: &[usize]) -> String {
        format!("{} {dims:?}", self.path.join("."))
    }

    /// Feeds a tensor with all its digits to the hash of the structure.
    fn whole(&mut self, entry: &str, data: &TensorData) {
        self.structure
            .update(format!("{entry} {:?}\n", data.dtype()));
        self.structure.update(data.as_bytes());
    }
}

impl ModuleVisitor for Parameters {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let values = param.val();
        let entry = self.entry(&values.dims());
        self.values.update(format!("{entry}\n"));
        let data = values.into_data();
        if let DType::QFloat(_) = data.dtype() {
            self.whole(&entry, &data);
            self.mark(self.path.join("."));
            return;
        }
        if data.dtype() == DType::F64 && data.iter::<f64>().any(|v| f64::from(v as f32) != v) {
            self.whole(&entry, &data);
        }
        let values = data.convert::<f32>();
        for value in values.as_slice::<f32>().expect("converted to f32") {
            self.values.update(value.to_le_bytes());
        }
        self.mark(self.path.join("."));
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let values = param.val();
        let entry = self.entry(&values.dims());
        self.values.update(format!("{entry}\n"));
        let data = values.into_data();
        let is_u32 = match data.dtype() {
            DType::U64 => data.iter::<u64>().all(|v| u32::try_from(v).is_ok()),
            DType::U32 | DType::U16 | DType::U8 => true,
            _ => data.iter::<i64>().all(|v| u32::try_from(v).is_ok()),
        };
        if !is_u32 {
            let is_u64 = data.dtype() == DType::U64;
            let is_beyond = is_u64 && data.iter::<u64>().any(|v| i64::try_from(v).is_err());
            let data = if is_beyond {
                data
            } else {
                data.convert::<i64>()
            };
            self.whole(&entry, &data);
            self.mark(self.path.join("."));
            return;
        }
        let values = data.convert::<u32>();
        for value in values.as_slice::<u32>().expect("converted to u32") {
            self.values.update(value.to_le_bytes());
        }
        self.mark(self.path.join("."));
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        let values = param.val();
        let entry = self.entry(&values.dims());
        // Devices differ in the width of a truth value.
        let values: Vec<u8> = values.into_data().iter::<bool>().map(u8::from).collect();
        self.structure.update(format!("{entry} bool\n"));
        self.structure.update(values);
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        if is_enum(container) {
            self.structure
                .update(format!("{} {name}\n", self.path.join(".")));
        } else {
            self.path.push(name.into());
        }
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        if !is_enum(container) {
            self.path.pop();
        }
    }
}

/// Whether a module is the variant of an enum, whose name is not a part of a path.
pub(crate) fn is_enum(container: &str) -> bool {
    container.starts_with("Enum")
}
