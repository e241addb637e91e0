//! CUDA, ROCm and wgpu: the logits of a slab of rows are read once for the losses, and once more to become
//! gradients in their place.

use std::ops::Range;

use burn::backend::DType;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};
use cubecl::prelude::*;

use super::head::{Bias, Head};
use super::{LossOps, composed};
use crate::cube::{
    UNITS, address_type, buffer, contiguous, cube_for_each, elem, empty, is_supported,
    max_of_units, row_of_cube, sum_of_lanes, sum_of_units, units_for, width_of_rows,
};
use crate::dtype::cast;
use crate::matmul::MatmulOps;

/// The logits of some rows with what turns them into losses and gradients.
struct Slab<'a> {
    /// The products with the weight of the head, `[rows, vocab]`.
    products: CubeTensor,
    bias: Option<&'a CubeTensor>,
    cap: Option<f32>,
    /// Those of all rows.
    targets: &'a CubeTensor,
    lse: &'a CubeTensor,
    rows: Range<usize>,
}

impl Slab<'_> {
    fn sizes(&self) -> SizesLaunch {
        let vocab = self.products.meta.shape()[1];
        let width = width_of_rows(vocab);
        SizesLaunch::new(
            self.rows.len(),
            self.rows.start,
            vocab / width,
            self.cap.unwrap_or(1.0),
        )
    }

    fn width(&self) -> usize {
        width_of_rows(self.products.meta.shape()[1])
    }

    fn units(&self) -> CubeDim {
        units_for(self.products.meta.shape()[1] / self.width())
    }

    /// The dtypes of the products, of the targets and of the bias.
    fn dtypes(&self) -> [ElemType; 3] {
        let bias = self.bias.map_or(DType::F32, |bias| bias.dtype);
        [self.products.dtype, self.targets.dtype, bias].map(elem)
    }

    /// Writes the losses and the log-sum-exps of the rows.
    fn losses(&self, nll: &CubeTensor) {
        // SAFETY: the kernel checks rows and columns against the sizes, which are those of the tensors; a
        // target out of range is not read.
        unsafe {
            losses_kernel::launch_unchecked(
                &self.products.client,
                cube_for_each(self.rows.len()),
                self.units(),
                address_type(&[&self.products]),
                self.width(),
                buffer(&self.products),
                self.bias.map(buffer).into(),
                buffer(self.targets),
                buffer(nll),
                buffer(self.lse),
                self.sizes(),
                self.cap.is_some(),
                self.dtypes(),
            );
        }
    }

    /// The gradients of the losses for the products, times the gradient of each loss if it is given.
    fn slopes(self, dnll: Option<&CubeTensor>) -> CubeTensor {
        // SAFETY: as for the losses.
        unsafe {
            slopes_kernel::launch_unchecked(
                &self.products.client,
                cube_for_each(self.rows.len()),
                self.units(),
                address_type(&[&self.products]),
                self.width(),
                buffer(&self.products),
                self.bias.map(buffer).into(),
                buffer(self.targets),
                buffer(self.lse),
                dnll.map(buffer).into(),
                self.sizes(),
                self.cap.is_some(),
                self.dtypes(),
            );
        }
        self.products
    }
}

/// The bias in its order, and the cap.
fn of_head(head: &Head<CubeBackend>) -> (Option<CubeTensor>, Option<f32>) {
    let bias = match &head.bias {
        Bias::Each(bias) => Some(contiguous(bias.clone())),
        Bias::Absent => None,
    };
    (bias, head.softcap.map(|cap| cap.value() as f32))
}

fn is_native(x: &CubeTensor, head: &Head<CubeBackend>) -> bool {
    let supports_bias = match &head.bias {
        Bias::Each(bias) => is_supported(bias.dtype),
        Bias::Absent => true,
    };
    let shape = head.weight.meta.shape();
    is_supported(x.dtype) && supports_bias && shape.num_elements() > 0
}

/// See [`composed::forward`].
fn forward(
    x: CubeTensor,
    head: Head<CubeBackend>,
    targets: CubeTensor,
    with_dx: bool,
) -> (CubeTensor, CubeTensor, Option<CubeTensor>) {
    if !is_native(&x, &head) {
        return composed::forward::<CubeBackend>(x, head, targets, with_dx);
    }
    let head = head.cast(x.dtype);
    let (bias, cap) = of_head(&head);
    let (targets, rows) = (contiguous(targets), x.meta.shape()[0]);
    let (nll, lse) = (empty(&x, [rows], DType::F32), empty(&x, [rows], DType::F32));
    let mut dx = Vec::new();
    for rows in composed::chunks::<CubeBackend>(&x, &head.weight) {
        let of_rows = composed::rows_of::<CubeBackend>(&x, &rows);
        let products = CubeBackend::dense_matmul(of_rows, head.weight.clone());
        let slab = Slab {
            products: contiguous(products),
            bias: bias.as_ref(),
            cap,
            targets: &targets,
            lse: &lse,
            rows,
        };
        slab.losses(&nll);
        if with_dx {
            let slopes = slab.slopes(None);
            dx.push(CubeBackend::dense_matmul_dx(slopes, head.weight.clone()));
        }
    }
    let dx = with_dx.then(|| match dx.len() {
        1 => dx.swap_remove(0),
        _ => CubeBackend::float_cat(dx, 0),
    });
    (nll, lse, dx)
}

impl LossOps for CubeBackend {
    fn linear_cross_entropy_forward(
        x: FloatTensor<Self>,
        head: Head<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (nll, lse, _) = forward(x, head, targets, false);
        (nll, lse)
    }

    fn linear_cross_entropy_with_dx(
        x: FloatTensor<Self>,
        head: Head<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        let (nll, lse, dx) = forward(x, head, targets, true);
        (nll, lse, dx.expect("the gradient is requested"))
    }

    fn linear_cross_entropy_dhead(
        x: FloatTensor<Self>,
        head: Head<Self>,
        targets: IntTensor<Self>,
        lse: FloatTensor<Self>,
        dnll: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, Bias<Self>) {
        // The gradient of a bias is a sum in `f32` of what the kernels would round to the dtype of `x`.
        let is_exact = x.dtype == DType::F32 || matches!(head.bias, Bias::Absent);
        if !is_exact || !is_native(&x, &head) || [lse.dtype, dnll.dtype] != [DType::F32; 2] {
            return composed::dhead::<Self>(x, head, targets, lse, dnll);
        }
        let dtype = head.weight.dtype;
        let head = head.cast(x.dtype);
        let (bias, cap) = of_head(&head);
        let [targets, lse, dnll] = [targets, lse, dnll].map(contiguous);
        let zeros = |shape| Self::float_zeros(shape, &x.device, DType::F32.into());
        let mut dweight = None;
        let mut dbias = bias.as_ref().map(|bias| zeros(bias.meta.shape().clone()));
        for rows in composed::chunks::<Self>(&x, &head.weight) {
            let x = composed::rows_of::<Self>(&x, &rows);
            let products = Self::dense_matmul(x.clone(), head.weight.clone());
            let slab = Slab {
                products: contiguous(products),
                bias: bias.as_ref(),
                cap,
                targets: &targets,
                lse: &lse,
                rows,
            };
            let d = slab.slopes(Some(&dnll));
            if let Some(sum) = dbias {
                let part = Self::float_sum_dim(d.clone(), 0);
                let part = Self::float_reshape(part, sum.meta.shape().clone());
                dbias = Some(Self::float_add(sum, part));
            }
            let part = Self::dense_matmul_dweight(x, d, DType::F32);
            dweight = Some(match dweight {
                None => part,
                Some(sum) => Self::float_add(sum, part),
            });
        }
        let dweight = dweight.unwrap_or_else(|| zeros(head.weight.meta.shape().clone()));
        let dbias = match (dbias, head.bias) {
            (Some(dbias), Bias::Each(bias)) => Bias::Each(cast::<Self>(dbias, bias.dtype)),
            _ => Bias::Absent,
        };
        (cast::<Self>(dweight, dtype), dbias)
    }
}

/// The sizes of a slab; columns are counted in vectors.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
struct Sizes {
    rows: usize,
    /// The position of the first row among all.
    first: usize,
    columns: usize,
    cap: f32,
}

/// The logits at a position, from the products with the weight.
#[cube]
fn logits<L: Float, W: Float, C: Size>(
    products: Vector<L, C>,
    bias: ComptimeOption<&[Vector<W, C>]>,
    column: usize,
    sizes: &Sizes,
    #[comptime] is_capped: bool,
) -> Vector<f32, C> {
    let mut logits = Vector::<f32, C>::cast_from(products);
    #[comptime]
    match bias {
        ComptimeOption::Some(bias) => {
            logits += Vector::<f32, C>::cast_from(bias[column]);
        }
        ComptimeOption::None => {}
    }
    if is_capped {
        let cap = Vector::<f32, C>::new(sizes.cap);
        logits = cap * (logits / cap).tanh();
    }
    logits
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn losses_kernel<L: Float, I: Int, W: Float, C: Size>(
    products: &[Vector<L, C>],
    bias: ComptimeOption<&[Vector<W, C>]>,
    targets: &[I],
    nll: &mut [f32],
    lse: &mut [f32],
    sizes: Sizes,
    #[comptime] is_capped: bool,
    #[define(L, I, W)] _dtypes: [ElemType; 3],
) {
    let row = row_of_cube();
    if row >= sizes.rows {
        terminate!();
    }
    let first = row * sizes.columns;
    // The largest logit of a unit, and the sum of the exponentials of what is below it.
    let mut most = f32::min_value();
    let mut sum = f32::new(0.0);
    let mut at = UNIT_POS as usize;
    while at < sizes.columns {
        let logits = logits::<L, W, C>(products[first + at], bias, at, &sizes, is_capped);
        let mut next = most;
        #[unroll]
        for lane in 0..C::value() {
            next = max(next, logits.extract(lane));
        }
        let exp = (logits - Vector::<f32, C>::new(next)).exp();
        sum = sum * (most - next).exp() + sum_of_lanes::<C>(exp);
        most = next;
        at += CUBE_DIM_X as usize;
    }
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let most_of_row = max_of_units(&mut shared, most);
    let sum = sum_of_units(&mut shared, sum * (most - most_of_row).exp());
    if UNIT_POS == 0 {
        let of_row = sum.ln() + most_of_row;
        let target = usize::cast_from(targets[sizes.first + row]);
        let column = target / C::value();
        let mut of_target = f32::min_value();
        if column < sizes.columns {
            let logits =
                logits::<L, W, C>(products[first + column], bias, column, &sizes, is_capped);
            #[unroll]
            for lane in 0..C::value() {
                of_target = select(lane == target % C::value(), logits.extract(lane), of_target);
            }
        }
        lse[sizes.first + row] = of_row;
        nll[sizes.first + row] = of_row - of_target;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn slopes_kernel<L: Float, I: Int, W: Float, C: Size>(
    products: &mut [Vector<L, C>],
    bias: ComptimeOption<&[Vector<W, C>]>,
    targets: &[I],
    lse: &[f32],
    dnll: ComptimeOption<&[f32]>,
    sizes: Sizes,
    #[comptime] is_capped: bool,
    #[define(L, I, W)] _dtypes: [ElemType; 3],
) {
    let row = row_of_cube();
    if row >= sizes.rows {
        terminate!();
    }
    let first = row * sizes.columns;
    let target = usize::cast_from(targets[sizes.first + row]);
    let lse = Vector::<f32, C>::new(lse[sizes.first + row]);
    let mut at = UNIT_POS as usize;
    while at < sizes.columns {
        let logits = logits::<L, W, C>(products[first + at], bias, at, &sizes, is_capped);
        let p = (logits - lse).exp();
        let mut slope = Vector::<f32, C>::empty();
        #[unroll]
        for lane in 0..C::value() {
            let p = p.extract(lane);
            slope.insert(lane, select(at * C::value() + lane == target, p - 1.0, p));
        }
        if is_capped {
            let share = logits / Vector::<f32, C>::new(sizes.cap);
            slope *= Vector::<f32, C>::new(1.0) - share * share;
        }
        #[comptime]
        match dnll {
            ComptimeOption::Some(dnll) => {
                slope *= Vector::<f32, C>::new(dnll[sizes.first + row]);
            }
            ComptimeOption::None => {}
        }
        products[first + at] = Vector::cast_from(slope);
        at += CUBE_DIM_X as usize;
    }
}
