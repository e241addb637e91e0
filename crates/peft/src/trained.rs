//! The walk over the parameters that train, by their paths.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;

use crate::fingerprint::is_enum;

/// What is done with each parameter that trains.
pub(crate) trait Look {
    /// `path` is that in the module, without the names of variants.
    fn look<const D: usize>(&mut self, path: &str, param: &Param<Tensor<D>>);
}

/// Looks at each parameter that trains, in the order of the module.
pub(crate) fn look_at_trained<M: Module>(model: &M, look: &mut impl Look) {
    let mut walk = Walk {
        path: Vec::new(),
        with: look,
    };
    model.visit(&mut walk);
}

/// What a parameter that trains becomes.
pub(crate) trait Change {
    /// The new value of the parameter at `path`, on the device of the value, which has no gradient.
    fn change<const D: usize>(&mut self, path: &str, id: ParamId, value: Tensor<D>) -> Tensor<D>;
}

/// Changes parameters that train, which then train on.
pub(crate) fn change_trained<M: Module>(model: M, change: &mut impl Change) -> M {
    let mut walk = Walk {
        path: Vec::new(),
        with: change,
    };
    model.map(&mut walk)
}

struct Walk<'a, W> {
    path: Vec<String>,
    with: &'a mut W,
}

impl<W> Walk<'_, W> {
    fn enter(&mut self, name: &str, container: &str) {
        if !is_enum(container) {
            self.path.push(name.into());
        }
    }

    fn exit(&mut self, container: &str) {
        if !is_enum(container) {
            self.path.pop();
        }
    }
}

impl<L: Look> ModuleVisitor for Walk<'_, L> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.is_require_grad() {
            self.with.look(&self.path.join("."), param);
        }
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        self.exit(container);
    }
}

impl<C: Change> ModuleMapper for Walk<'_, C> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !param.is_require_grad() {
            return param;
        }
        let path = self.path.join(".");
        let (id, tensor, mapper) = param.consume();
        // Lost with the graph: a parameter must meet its inputs under the strategy that they have.
        let strategy = tensor.gradient_checkpointing_strategy();
        let mut tensor = Tensor::from_inner(self.with.change(&path, id, tensor.inner()));
        if let Some(strategy) = strategy {
            tensor = tensor.with_gradient_checkpointing_strategy(strategy);
        }
        let tensor = tensor.require_grad();
        Param::from_mapped_value(id, tensor, mapper)
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, container: &str) {
        self.exit(container);
    }
}
