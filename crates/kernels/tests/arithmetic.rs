//! Each arithmetic of the processor computes the same products. A binary of its own, because the choice is
//! that of the process.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use kernels::{Arithmetic, Layout, Levels, Precision, pack, quant_matmul, set_arithmetic};

/// A product with its gradients, each with the sums in `f64` and the sums of the magnitudes of their
/// terms.
struct Case {
    layout: Layout,
    rows: usize,
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
    x: Vec<f32>,
    dy: Vec<f32>,
}

/// Values in `from .. from + width`, without a pattern.
fn values(n: usize, seed: usize, from: f32, width: f32) -> Vec<f32> {
    let value = |at: usize| ((at * 7919 + seed * 104_729 + 17) % 10_007) as f32 / 10_007.0;
    (0..n).map(|at| from + width * value(at)).collect()
}

impl Case {
    fn new(rows: usize, layout: Layout) -> Self {
        let (d_in, d_out) = (layout.d_in(), layout.d_out());
        let n_grid = layout.n_groups() * d_out;
        let n_codes = (1 << layout.bits()) as f32;
        Self {
            layout,
            rows,
            codes: values(d_in * d_out, 1, 0.0, n_codes)
                .into_iter()
                .map(|code| code as u8)
                .collect(),
            scales: values(n_grid, 2, 0.01, 0.1),
            zeros: values(n_grid, 3, 0.0, n_codes - 1.0),
            x: values(rows * d_in, 4, -1.0, 2.0),
            dy: values(rows * d_out, 5, -1.0, 2.0),
        }
    }

    /// `y`, `dx`, `dscales` and `dzeros`.
    fn run(&self, precision: Precision) -> [Vec<f32>; 4] {
        let device = Device::flex();
        let floats = |values: &[f32], shape: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), &device)
        };
        let (layout, grid) = (self.layout, self.layout.grid_shape());
        let words = TensorData::new(pack(&self.codes, &layout), layout.words_shape());
        let words = Tensor::<3, Int>::from_data(words, (&device, DType::U32));
        let leaves = [
            floats(&self.x, [self.rows, layout.d_in()]),
            floats(&self.scales, grid),
            floats(&self.zeros, grid),
        ];
        let [x, scales, zeros] = leaves.map(|leaf| leaf.autodiff().require_grad());
        let y = quant_matmul(
            x.clone(),
            words,
            scales.clone(),
            Some(zeros.clone()),
            layout,
            precision,
        );
        let dy = floats(&self.dy, [self.rows, layout.d_out()]);
        let gradients = (y.clone() * dy.autodiff()).sum().backward();
        let of = |leaf: Tensor<2>| leaf.grad(&gradients).unwrap();
        [y.inner(), of(x), of(scales), of(zeros)]
            .map(|tensor| tensor.into_data().try_into_vec::<f32>().unwrap())
    }

    /// The same in `f64`, each with the sum of the magnitudes of its terms.
    fn expected(&self) -> [Vec<[f64; 2]>; 4] {
        let (d_in, d_out) = (self.layout.d_in(), self.layout.d_out());
        let mut sums = [
            vec![[0.0; 2]; self.rows * d_out],
            vec![[0.0; 2]; self.rows * d_in],
            vec![[0.0; 2]; self.scales.len()],
            vec![[0.0; 2]; self.scales.len()],
        ];
        let largest = |values: &[f32]| values.iter().fold(0.0f32, |most, v| most.max(v.abs()));
        for (row, i, o) in (0..self.rows)
            .flat_map(|row| (0..d_in).flat_map(move |i| (0..d_out).map(move |o| (row, i, o))))
        {
            let at = i / self.layout.group_size() * d_out + o;
            let (scale, zero) = (f64::from(self.scales[at]), f64::from(self.zeros[at]));
            let level = f64::from(self.codes[i * d_out + o]) - zero;
            let x = f64::from(self.x[row * d_in + i]);
            let dy = f64::from(self.dy[row * d_out + o]);
            // Rows are rounded relative to their largest value, and codes are near their zero.
            let x_most = f64::from(largest(&self.x[row * d_in..][..d_in]));
            let dy_most = f64::from(largest(&self.dy[row * d_out..][..d_out]));
            let most = level.abs() + 1.0;
            let mut add = |which: usize, at: usize, term: f64, bound: f64| {
                sums[which][at][0] += term;
                sums[which][at][1] += bound;
            };
            add(0, row * d_out + o, x * scale * level, x_most * scale * most);
            add(1, row * d_in + i, dy * scale * level, dy_most * 0.11 * most);
            add(2, at, x * dy * level, x_most * dy.abs() * most);
            add(3, at, -scale * x * dy, x_most * scale * dy.abs());
        }
        sums
    }
}

#[test]
fn every_arithmetic_computes_the_sums() {
    let layouts = [(4, 64), (4, 320), (3, 32), (2, 128), (8, 48), (4, 7)];
    for (bits, group) in layouts {
        for rows in [1, 9, 45] {
            let layout = Layout::new(320, 70, bits, group, Levels::Unsigned);
            let case = Case::new(rows, layout);
            let expected = case.expected();
            let each = [Arithmetic::Float, Arithmetic::Vnni, Arithmetic::Amx];
            let supported = each.into_iter().filter(|one| one.is_supported());
            for (arithmetic, (precision, unit)) in supported.flat_map(|one| {
                [(Precision::Full, 1e-6), (Precision::Fast, 2e-4)].map(|of| (one, of))
            }) {
                set_arithmetic(arithmetic).unwrap();
                for (found, expected) in case.run(precision).iter().zip(&expected) {
                    assert_eq!(found.len(), expected.len());
                    for (found, [sum, bound]) in found.iter().zip(expected) {
                        let error = (f64::from(*found) - sum).abs();
                        assert!(
                            error <= unit * bound,
                            "{found} for {sum}, {arithmetic:?}, {precision:?}, {layout:?}, {rows} rows"
                        );
                    }
                }
            }
        }
    }

    // The choice is made: integers do not round as floats do.
    let case = Case::new(45, Layout::new(320, 70, 4, 64, Levels::Unsigned));
    set_arithmetic(Arithmetic::Float).unwrap();
    let [float, ..] = case.run(Precision::Full);
    for arithmetic in [Arithmetic::Vnni, Arithmetic::Amx] {
        match set_arithmetic(arithmetic) {
            Ok(()) => assert_ne!(case.run(Precision::Full)[0], float, "{arithmetic:?}"),
            Err(error) => assert_eq!(
                error.to_string(),
                format!("the processor does not have {arithmetic}")
            ),
        }
    }
}
